"""Files out. Configs name from here: SaveImageLabelMapd, metric_handlers, History, Report, Overlays."""

from .history import History
from .label_maps import SaveImageLabelMapd
from .metrics import metric_handlers
from .report import Overlays, Report

__all__ = ["History", "Overlays", "Report", "SaveImageLabelMapd", "metric_handlers"]
