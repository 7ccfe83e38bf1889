"""Which files are images, by their endings, and how large they may be."""

from __future__ import annotations

__all__ = ["MOST_CLASSES", "MOST_VALUES", "PICTURES", "SERIES", "UNREAD", "VOLUMES"]

VOLUMES = (".nii.gz", ".nii")

PICTURES = (".jpg", ".jpeg", ".png", ".bmp")

SERIES = ".dcm"
"""Among the endings of image files, stands for folders of DICOM files, whatever their names: each is one image."""

UNREAD = (".mha", ".mhd", ".nrrd", ".nhdr", ".mgz", ".mgh", ".hdr", ".img", ".tif", ".tiff", ".gif", ".webp", ".svs")
"""Endings of images in formats that are not read."""

MOST_VALUES = 2**31
"""Values of the largest volume that is read: 8 GB of floats."""

MOST_CLASSES = 256
"""Label maps are of unsigned 8 bit."""
