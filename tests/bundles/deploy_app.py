"""A MONAI Deploy application as a hospital would write it: a DICOM series in, a bundle, a DICOM segmentation out.

python deploy_app.py -i SERIES -o OUT BUNDLE          # from the folder of a release
PYTHONPATH=BUNDLE python deploy_app.py -i SERIES -o OUT -m BUNDLE/models/model.ts
"""

from __future__ import annotations

import sys
from pathlib import Path

from monai.deploy.conditions import CountCondition
from monai.deploy.core import Application, Image, IOType
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_seg_writer_operator import DICOMSegmentationWriterOperator, SegmentDescription
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator
from monai.deploy.operators.dicom_series_to_volume_operator import DICOMSeriesToVolumeOperator
from monai.deploy.operators.monai_bundle_inference_operator import (
    BundleConfigNames,
    IOMapping,
    MonaiBundleInferenceOperator,
)
from pydicom.sr.coding import Code

STRUCTURES = {
    "right ventricle": Code("53085002", "SCT", "Right ventricle"),
    "myocardium": Code("49848007", "SCT", "Myocardium of left ventricle"),
    "left ventricle": Code("87878005", "SCT", "Left ventricle"),
}


class App(Application):
    """The operators, and what each hands to the next.

    Args:
        bundle: folder of a release, or None where ``-m`` names a TorchScript file.
    """

    def __init__(self, bundle: Path | None) -> None:
        self.bundle = bundle
        super().__init__([sys.executable, *sys.argv])

    def compose(self) -> None:
        context = Application.init_app_context(self.argv)
        once = CountCondition(self, 1)  # without it, the application does not end
        load = DICOMDataLoaderOperator(self, once, input_folder=Path(context.input_path), name="load")
        select = DICOMSeriesSelectorOperator(self, name="select")  # the first series
        volume = DICOMSeriesToVolumeOperator(self, name="volume")
        segment = MonaiBundleInferenceOperator(
            self,
            app_context=context,
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
            bundle_path=self.bundle,
            bundle_config_names=BundleConfigNames(config_names=["inference"]),
            name="segment",
        )
        segments = [
            SegmentDescription(name, Code("123037004", "SCT", "Anatomical Structure"), code, "FIAS", "1")
            for name, code in STRUCTURES.items()
        ]
        folder = Path(context.output_path)
        write = DICOMSegmentationWriterOperator(self, segment_descriptions=segments, output_folder=folder, name="write")
        self.add_flow(load, select, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(select, volume, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(volume, segment, {("image", "image")})
        self.add_flow(select, write, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(segment, write, {("pred", "seg_image")})


if __name__ == "__main__":
    place = Path(sys.argv.pop()) if "-m" not in sys.argv else None
    App(place).run()
