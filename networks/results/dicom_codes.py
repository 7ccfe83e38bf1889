"""What structures are called in DICOM: the codes of all volume bundles' structures, and the segments that bear them."""

from __future__ import annotations

from typing import Any

from pydicom.sr.coding import Code

from .pictures import COLOURS

__all__ = ["CODES", "MAKER", "described"]

CODES = {
    "right ventricle": ("53085002", "Right ventricle"),
    "myocardium": ("49848007", "Myocardium of left ventricle"),
    "left ventricle": ("87878005", "Left ventricle"),
    "aorta": ("15825003", "Aorta"),
    "gallbladder": ("28231008", "Gallbladder"),
    "left kidney": ("64033007", "Kidney", "7771000", "Left"),
    "right kidney": ("64033007", "Kidney", "24028007", "Right"),
    "liver": ("10200004", "Liver"),
    "pancreas": ("15776009", "Pancreas"),
    "spleen": ("78961009", "Spleen"),
    "stomach": ("69695003", "Stomach"),
}
"""SNOMED CT's code and meaning of each structure of the volume bundles, and those of its side."""

CATEGORY = Code("123037004", "SCT", "Anatomical Structure")
"""Of the structures in the table: where 3D Slicer, dcmqi and MONAI Label look for them."""

UNKNOWN = Code("85756007", "SCT", "Tissue")
"""Category and type of any other structure, as 3D Slicer and dcmqi have it for a new segment."""

FAMILY = Code("123110", "DCM", "Artificial Intelligence")
MAKER = "FIAS and DANIE"


def described(hd: Any, number: int, name: str, algorithm: str, version: str) -> Any:
    """A segment of highdicom: named, coded, and coloured as in :data:`networks.results.pictures.COLOURS`.

    Args:
        hd: the package highdicom.
        number: of the class, from 1.
        name: of the structure. One that is not in :data:`CODES` keeps it, and is coded as :data:`UNKNOWN`.
        algorithm: what found it.
        version: of that.
    """
    value, meaning, *side = CODES.get(name.lower(), (UNKNOWN.value, UNKNOWN.meaning))
    segment = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=CATEGORY if name.lower() in CODES else UNKNOWN,
        segmented_property_type=Code(value, "SCT", meaning),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(algorithm, FAMILY, version, MAKER),
        display_color=hd.color.CIELabColor.from_rgb(*COLOURS[(number - 1) % len(COLOURS)]),
    )
    if side:
        kind = segment.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [hd.sr.CodedConcept(side[0], "SCT", side[1])]
    return segment
