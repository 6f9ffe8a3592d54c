"""What is done to a model beside choosing codes? Transforms, each by its name, and what one needs.

`rotate` changes the checkpoint before anything else is done (`convert.rotate`); `awq` scales channels before the codes
of a block are chosen, and `tweak-norms` adjusts its norms after it (`convert.calibrate`).
"""

from __future__ import annotations

from collections.abc import Sequence

from tersor.errors import InputError, did_you_mean

ROTATE, AWQ, TWEAK_NORMS = "rotate", "awq", "tweak-norms"

TRANSFORMS = (ROTATE, AWQ, TWEAK_NORMS)
"""All of them, in the order in which they are done, whatever the order in which they are asked for."""

CALIBRATED = (AWQ, TWEAK_NORMS)
"""Those that need a text to calibrate on."""


def parse_transforms(names: Sequence[str]) -> tuple[str, ...]:
    """Return the transforms that a user names, each once, in the order in which they are done.

    Raises:
        InputError: there is no such transform.
    """
    if isinstance(names, str):
        raise InputError(f"transforms are a list of names, not the text {names!r}")
    for name in names:
        if name not in TRANSFORMS:
            raise InputError(
                f"unknown transform {name!r}{did_you_mean(str(name), TRANSFORMS)} (known: {', '.join(TRANSFORMS)})"
            )
    return tuple(name for name in TRANSFORMS if name in names)
