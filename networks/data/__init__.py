"""Files in. Configs name from here: cases, image_files, LoadVolumed, MapLabelsd, CheckLabeld, SliceOrientationd,
ScaleIntensityByd, FieldOfViewd, SliceDataset, VolumeDataset, CaseBatches, in_frames."""

from .batches import CaseBatches, in_frames
from .folders import image_files
from .geometry import FieldOfViewd, SliceOrientationd, SlicesFirstd
from .intensity import ScaleIntensityByd
from .labels import CheckLabeld, MapLabelsd
from .layouts import cases
from .loading import LoadVolumed
from .slices import SliceDataset, VolumeDataset

__all__ = [
    "CaseBatches",
    "CheckLabeld",
    "FieldOfViewd",
    "LoadVolumed",
    "MapLabelsd",
    "ScaleIntensityByd",
    "SliceDataset",
    "SliceOrientationd",
    "SlicesFirstd",
    "VolumeDataset",
    "cases",
    "image_files",
    "in_frames",
]
