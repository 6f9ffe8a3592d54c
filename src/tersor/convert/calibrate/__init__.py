"""What do the layers of a model see of a text? Statistics block by block, and the codes that follow from them."""

from tersor.convert.calibrate.front import Plan, calibrate, check_options, costs, discard, plan, planned_again, score
from tersor.convert.calibrate.scores import unscored
from tersor.convert.calibrate.text import Calibration

__all__ = [
    "Calibration",
    "Plan",
    "calibrate",
    "check_options",
    "costs",
    "discard",
    "plan",
    "planned_again",
    "score",
    "unscored",
]
