"""What do the layers of a model see of a text? Statistics block by block, and the codes that follow from them."""

from tersor.convert.calibrate.front import Plan, calibrate, check_options, discard, plan
from tersor.convert.calibrate.text import Calibration

__all__ = ["Calibration", "Plan", "calibrate", "check_options", "discard", "plan"]
