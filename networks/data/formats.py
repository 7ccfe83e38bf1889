"""Which files are images, by their endings, and how large they may be."""

from __future__ import annotations

__all__ = ["MOST_CLASSES", "MOST_VALUES", "NIFTI", "OF_ITK", "PICTURES", "SERIES", "UNREAD", "VOLUMES"]

NIFTI = (".nii.gz", ".nii")

OF_ITK = (".nrrd", ".mha", ".mhd")
"""Volumes that ITK reads: MONAI Label converts segmentations from a DICOM server to the first."""

VOLUMES = (*NIFTI, *OF_ITK)

PICTURES = (".jpg", ".jpeg", ".png", ".bmp")

SERIES = ".dcm"
"""Among the endings of image files, stands for folders of DICOM files, whatever their names: each is one image."""

UNREAD = (".nhdr", ".mgz", ".mgh", ".hdr", ".img", ".tif", ".tiff", ".gif", ".webp", ".svs")
"""Endings of images in formats that are not read."""

MOST_VALUES = 2**31
"""Values of the largest volume that is read: 8 GB of floats."""

MOST_CLASSES = 256
"""Label maps are of unsigned 8 bit."""
