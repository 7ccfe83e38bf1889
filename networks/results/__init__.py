"""Files out. Configs name from here: SaveImageLabelMapd, SaveImageMapsd, recorded_numbers, Measures, metric_handlers,
History, Report, HeartReport, Overlays, DicomSegmentations."""

from .function import HeartReport
from .history import History
from .label_maps import SaveImageLabelMapd, SaveImageMapsd, recorded_numbers
from .measuring import Measures
from .metrics import metric_handlers
from .report import Overlays, Report
from .segmentations import DicomSegmentations

__all__ = [
    "DicomSegmentations",
    "HeartReport",
    "History",
    "Measures",
    "Overlays",
    "Report",
    "SaveImageLabelMapd",
    "SaveImageMapsd",
    "metric_handlers",
    "recorded_numbers",
]
