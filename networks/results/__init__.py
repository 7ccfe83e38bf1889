"""Files out. Configs name from here: SaveLabelMapd, metric_handlers, History, Report, Overlays."""

from .history import History
from .label_maps import SaveLabelMapd
from .metrics import metric_handlers
from .report import Overlays, Report

__all__ = ["History", "Overlays", "Report", "SaveLabelMapd", "metric_handlers"]
