"""Files in. Configs name from here: cases, image_files, LoadVolumed, MapLabelsd, CheckLabeld, SliceOrientationd,
ScaleIntensityByd, FieldOfViewd, SliceDataset, VolumeDataset."""

from .folders import image_files
from .geometry import FieldOfViewd, SliceOrientationd, SlicesFirstd
from .intensity import ScaleIntensityByd
from .labels import CheckLabeld, MapLabelsd
from .layouts import cases
from .loading import LoadVolumed
from .slices import SliceDataset, VolumeDataset

__all__ = [
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
]
