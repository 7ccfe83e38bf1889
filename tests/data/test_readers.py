"""What a file's header says is what is read: position, unit and shape of NIfTI files, and how a picture is held."""

from __future__ import annotations

from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd
from PIL import Image

from networks import DataError
from networks.data.formats import PICTURES
from networks.data.geometry import SliceOrientationd
from networks.data.labels import CheckLabeld
from networks.data.loading import LoadVolumed
from networks.data.readers import load_nifti
from networks.data.slices import VolumeDataset
from networks.results.label_maps import SaveImageLabelMapd
from networks.results.metrics import CaseMetric
from networks.results.pictures import read_slice

VOXELS = np.random.default_rng(0).integers(0, 900, (12, 10, 4)).astype(np.int16)
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, 0.2, 0.1) @ np.diag([1.4, 1.6, 9]), [5, -7, 11])
PERMUTED = np.array([[0, 1.4, 0, 0], [0, 0, 1.6, 0], [9, 0, 0, 0], [0, 0, 0, 1]])


def nifti(
    file: Path,
    voxels: np.ndarray = VOXELS,
    sform: tuple[np.ndarray, int] | None = None,
    qform: tuple[np.ndarray, int] | None = None,
    pixdim: tuple[float, ...] = (),
    unit: str = "mm",
    kind: type = nib.Nifti1Image,
) -> Path:
    """A file whose header says just that."""
    header = kind.header_class()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header.set_xyzt_units(unit)
    if qform:
        header.set_qform(*qform)
    if sform:
        header.set_sform(*sform)
    if pixdim:
        header.set_zooms((*pixdim, *(1,) * (voxels.ndim - 3)))
    nib.save(kind(voxels, None, header), file)
    return file


def read(file: Path | MetaTensor, **options: object) -> torch.Tensor:
    return LoadVolumed("image", **options)({"image": str(file) if isinstance(file, Path) else file})["image"]


HEADERS = {
    "sform alone, pixdim never set": ({"sform": (PERMUTED, 1)}, PERMUTED),
    "sform alone, oblique": ({"sform": (OBLIQUE, 2), "pixdim": (1.4, 1.6, 9)}, OBLIQUE),
    "sform alone, pixdim of another": ({"sform": (PERMUTED, 1), "pixdim": (2, 3, 4)}, PERMUTED),
    "qform alone": ({"qform": (OBLIQUE, 1)}, OBLIQUE),
    "both, unlike": ({"qform": (OBLIQUE, 1), "sform": (PERMUTED, 1)}, PERMUTED),
    "both, sform of 1 mm": ({"qform": (OBLIQUE, 1), "sform": (np.diag([-1, -1, 1, 1.0]), 2)}, np.diag([-1, -1, 1, 1])),
    "both, sform never written": ({"qform": (OBLIQUE, 1), "sform": (np.zeros((4, 4)), 1)}, OBLIQUE),
    "sform of 1 mm, pixdim alike": ({"sform": (np.diag([-1, 1, 1, 1.0]), 1)}, np.diag([-1, 1, 1, 1])),
}


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("what", HEADERS)
def test_a_volume_lies_where_its_coded_position_says(what, kind, tmp_path):
    header, affine = HEADERS[what]
    volume = read(nifti(tmp_path / "a.nii.gz", kind=kind, **header))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    assert np.array_equal(volume[0], VOXELS)


def test_acdc_s_headers_have_their_spacing_in_pixdim_alone(tmp_path):
    file = nifti(tmp_path / "a.nii.gz", sform=(np.diag([-1, -1, 1, 1.0]), 2), pixdim=(1.5, 1.7, 10))
    np.testing.assert_allclose(read(file).affine, np.diag([-1.5, -1.7, 10, 1]), atol=1e-5)


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1e3), ("meter", 1e-3), ("unknown", 1), ("mm", 1)])
def test_positions_and_distances_are_in_millimetres_whatever_the_unit(unit, factor, tmp_path):
    affine = OBLIQUE.copy()
    affine[:3] *= factor
    file = nifti(tmp_path / "a.nii.gz", sform=(affine, 1), qform=(affine, 1), unit=unit)
    volume = read(file)
    np.testing.assert_allclose(volume.affine, OBLIQUE, rtol=1e-4, atol=1e-4)
    truth, pred = volume * 0, volume * 0
    truth[0, 2:6, 2:6], pred[0, 3:7, 2:6] = 1, 1
    hd95 = CaseMetric("hd95", 2)
    hd95(y_pred=[pred], y=[truth])
    assert hd95.aggregate().item() == pytest.approx(1.4, rel=0.01)
    SaveImageLabelMapd("image", tmp_path / "out")({"image": volume})
    written = nib.load(tmp_path / "out" / "a_seg.nii.gz")
    assert np.array_equal(written.affine, nib.load(file).affine) and written.header.get_xyzt_units()[0] == unit


def turned(file: Path, length: float, kind: type = nib.Nifti1Image) -> Path:
    """A volume turned by half a turn about z, its quaternion of another length."""
    nifti(file, qform=(np.diag([-1.4, -1.6, 9, 1]), 1), kind=kind)
    place, number = (256, "<f4") if kind is nib.Nifti1Image else (352, "<f8")
    raw, quaternion = bytearray(file.read_bytes()), np.array([0, 0, length], number).tobytes()
    raw[place : place + len(quaternion)] = quaternion
    file.write_bytes(raw)
    return file


def test_a_quaternion_that_is_no_rotation_is_refused_as_that(tmp_path):
    with pytest.raises(DataError, match="rotation.*a.nii"):
        read(turned(tmp_path / "a.nii", 1.001))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("length", [1 + 2**-22, 1 + 1e-5])
def test_a_quaternion_longer_than_1_by_rounding_is_a_rotation(length, kind, tmp_path):
    file = turned(tmp_path / "a.nii", length, kind)
    volume = read(file)
    np.testing.assert_allclose(volume.affine, np.diag([-1.4, -1.6, 9, 1]), atol=1e-4)
    SaveImageLabelMapd("image", tmp_path / "out")({"image": volume})
    written = nib.load(tmp_path / "out" / "a_seg.nii.gz")  # which nibabel refuses of the image itself
    np.testing.assert_allclose(written.affine, np.diag([-1.4, -1.6, 9, 1]), atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 10, 4, 1), (12, 10, 4, 1, 1), (12, 10, 1, 1, 1, 1)])
def test_trailing_dimensions_of_1_are_none_and_the_label_map_has_them_too(shape, tmp_path):
    voxels = VOXELS[: shape[0], : shape[1], : shape[2]].reshape(shape)
    volume = read(nifti(tmp_path / "a.nii.gz", voxels, sform=(OBLIQUE, 1)))
    assert volume.shape == (1, *shape[:3])
    SaveImageLabelMapd("image", tmp_path / "out")({"image": volume})
    assert nib.load(tmp_path / "out" / "a_seg.nii.gz").shape == shape


def test_channels_of_one_file_stay_channels(tmp_path):
    file = nifti(tmp_path / "a.nii.gz", np.stack([VOXELS] * 3, 3), sform=(OBLIQUE, 1))
    assert read(file, channels=3).shape == (3, 12, 10, 4)


PHOTO = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[::-1],
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: x.swapaxes(0, 1)[:, ::-1],
}
"""How a picture is stored that viewers show as it is, by its EXIF orientation."""


def stored(file: Path, orientation: int, pixels: np.ndarray = PHOTO) -> Path:
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(np.ascontiguousarray(TURNS[orientation](pixels))).save(file, exif=exif)
    return file


@pytest.mark.parametrize("orientation", TURNS)
def test_a_picture_is_read_as_viewers_show_it_and_so_are_its_mask_and_overlay(orientation, tmp_path):
    image = stored(tmp_path / "a.png", orientation)
    volume = read(image, channels=3, suffixes=PICTURES)
    assert np.array_equal(volume[..., 0].numpy().T, PHOTO)
    assert np.array_equal(read_slice(str(image), 2, 0), PHOTO)
    mask = (PHOTO[..., 0] > 100).astype(np.uint8)
    turned, plain = stored(tmp_path / "turned.png", orientation, mask), stored(tmp_path / "plain.png", 1, mask)
    load = [
        LoadVolumed("image", channels=3, suffixes=PICTURES),
        LoadVolumed("label", suffixes=PICTURES),
        CheckLabeld("label", 2),
    ]
    for label in (turned, plain):
        case = VolumeDataset([{"image": str(image), "label": str(label)}], load)[0]
        assert np.array_equal(case["label"][0, ..., 0].numpy().T, mask)
    prepare = Compose([load[0], SliceOrientationd("image")])
    case = prepare({"image": str(image)})
    case["pred"] = case["image"][:1] * 0 + torch.from_numpy(mask.T[None, ..., None])
    case = Invertd("pred", prepare, "image", nearest_interp=True)(case)
    SaveImageLabelMapd("pred", tmp_path / "out", ".png")(case)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a_seg.png")), mask)


def test_a_picture_too_large_for_pillow_is_refused_as_that(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(DataError) as error:
        read(stored(tmp_path / "slide.png", 1), channels=3, suffixes=PICTURES)
    assert all(fact in str(error.value) for fact in ("slide.png", "too large", "2400")), error.value


def test_another_format_under_the_name_is_refused(tmp_path):
    file = tmp_path / "a.nii"
    nib.save(nib.MGHImage(VOXELS.astype(np.float32), np.eye(4)), tmp_path / "a.mgz")
    (tmp_path / "a.mgz").rename(file)
    with pytest.raises(DataError, match="a.nii"):
        read(file)
    assert isinstance(load_nifti(nifti(tmp_path / "b.nii.gz", sform=(OBLIQUE, 1))), nib.Nifti1Image)


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".mhd"])
def test_a_file_of_itk_lies_as_its_nifti_file_and_so_does_its_label_map(ending, tmp_path):
    source = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(VOXELS, OBLIQUE), source)
    file = tmp_path / "itk" / f"scan{ending}"
    file.parent.mkdir()
    itk.imwrite(itk.imread(str(source)), str(file))
    image, label = read(source), read(file)
    np.testing.assert_allclose(label.affine, image.affine, atol=1e-4)
    assert torch.equal(label.as_tensor(), image.as_tensor())
    CheckLabeld("label", num_classes=250)({"image": image, "label": (label / 4).floor()})
    SaveImageLabelMapd("pred", tmp_path)({"pred": label > 500})
    written = nib.load(tmp_path / "scan_seg.nii.gz")
    np.testing.assert_allclose(written.affine, image.affine, atol=1e-4)
    assert np.array_equal(np.asarray(written.dataobj), VOXELS > 500)


def test_what_is_no_file_of_itk_is_refused_by_name(tmp_path):
    for name, content in {"a.nrrd": b"NRRD0004\ntype: float\n", "b.mha": b"no image"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)


def test_an_image_in_memory_is_taken_as_its_file(tmp_path):
    """Without a channel axis and of whole numbers, as MONAI Deploy hands it over."""
    source = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(VOXELS, OBLIQUE), source)
    loaded = read(source)
    held = MetaTensor(torch.from_numpy(VOXELS), loaded.affine, {"original_channel_dim": "no_channel"})
    taken = read(held)
    assert torch.equal(taken.as_tensor(), loaded.as_tensor()) and taken.dtype == loaded.dtype
    assert torch.equal(taken.affine, loaded.affine)
    with pytest.raises(DataError, match="NaN"):
        read(held / 0)
