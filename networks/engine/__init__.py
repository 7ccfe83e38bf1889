"""What runs. Configs name from here: bundle_root, weights_in, check_config, record_run, in_engine, LabelInferer,
AutocastInferer, CaseEvaluator, unfinished, the handlers of a training, Checkpoints, and what several processes need."""

from .checkpoints import Checkpoints
from .checks import check_config
from .engines import in_engine
from .evaluator import CaseEvaluator, unfinished
from .handlers import AverageWeights, EpochSeed, ProgressBar, WholeOutput
from .inferers import AutocastInferer, LabelInferer
from .places import bundle_root, weights_in
from .processes import ShareBuffers, check_shares, leave_process_group
from .records import record_run

__all__ = [
    "AutocastInferer",
    "AverageWeights",
    "CaseEvaluator",
    "Checkpoints",
    "EpochSeed",
    "LabelInferer",
    "ProgressBar",
    "ShareBuffers",
    "WholeOutput",
    "bundle_root",
    "check_config",
    "check_shares",
    "in_engine",
    "leave_process_group",
    "record_run",
    "unfinished",
    "weights_in",
]
