"""What tests of several folders share: models, kernels and pretended devices; pyproject.toml puts it on the path."""
