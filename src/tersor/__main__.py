"""`python -m tersor` is the `tersor` command."""

from tersor.cli.main import main

if __name__ == "__main__":
    main()
