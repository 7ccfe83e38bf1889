"""Tests of one bundle in the form of the model zoo's ``ci/unit_tests``: on random images, through its workflows alone.

    PYTHONPATH=models/NAME python zoo_unit_tests.py models/NAME

in the folder above the unpacked release. :mod:`test_release` runs these.
"""

from __future__ import annotations

import json
import sys
import tempfile
import unittest
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.bundle import ConfigWorkflow
from PIL import Image

BUNDLE = Path(sys.argv.pop())
SIZE = 48


def write_images(folder: Path, channels: int, classes: int, cases: int = 10) -> None:
    """Images of random numbers with labels, in the layout ``folder``: volumes of one channel, or pictures."""
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for case in range(cases):
        label = random.integers(0, classes, (SIZE, SIZE, 4), dtype=np.uint8)
        label.flat[:classes] = range(classes)
        if channels == 1:
            image = random.normal(100, 30, label.shape).astype(np.float32)
            for kind, array in (("images", image), ("labels", label)):
                nib.save(nib.Nifti1Image(array, np.diag([1.5, 1.5, 8, 1])), folder / kind / f"case{case}.nii.gz")
        else:
            image = random.integers(0, 256, (SIZE, SIZE, channels), dtype=np.uint8)
            for kind, array in (("images", image), ("labels", label[..., 0])):
                Image.fromarray(array).save(folder / kind / f"case{case}.png")


class TestBundle(unittest.TestCase):
    """In the order of the names: evaluation and inference need the weights that training leaves."""

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.data = Path(folder.name)
        config = json.loads((BUNDLE / "configs" / "train.json").read_text())
        write_images(cls.data, config["in_channels"], config["num_classes"])
        cls.options = {"bundle_root": str(BUNDLE), "image_size": 32, "num_workers": 0, "device": "cpu"}
        cls.options |= {"size": "small"} if "size" in config else {}

    def run_workflow(self, kind: str, *configs: str, **options: object) -> None:
        """What the model zoo does with a bundle: its properties resolve, and it runs to its end."""
        workflow = ConfigWorkflow(
            workflow_type=kind,
            config_file=[str(BUNDLE / "configs" / f"{config}.json") for config in configs],
            logging_file=str(BUNDLE / "configs" / "logging.conf"),
            meta_file=str(BUNDLE / "configs" / "metadata.json"),
            **{**self.options, **options},
        )
        workflow.initialize()
        self.assertFalse(workflow.check_properties())
        workflow.run()
        workflow.finalize()

    def test_1_train(self) -> None:
        training = {"dataset_dir": str(self.data), "layout": "folder", "epochs": 1}
        self.run_workflow("train", "train", start_from="", pretrained=False, **training)
        self.assertTrue((BUNDLE / "models" / "model.pt").is_file())

    def test_2_evaluate(self) -> None:
        for kind, configs in (("train", ("train", "evaluate")), ("infer", ("evaluate",))):
            self.run_workflow(kind, *configs, dataset_dir=str(self.data), layout="folder")
            (BUNDLE / "eval" / "summary.md").unlink()

    def test_3_infer(self) -> None:
        self.run_workflow("infer", "inference", dataset_dir=str(self.data / "images"))
        self.assertEqual(len(list((BUNDLE / "eval").glob("*_seg.*"))), 10)


if __name__ == "__main__":
    unittest.main(verbosity=2)
