"""Volumes to slices and back: geometry that users rely on, and every slice visited as promised."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, random_heads
from monai.bundle import ConfigParser
from monai.data import DataLoader, MetaTensor
from monai.inferers import SliceInferer
from monai.transforms import Compose, Invertd, LoadImage, Resized
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from networks import FIAS, DataError
from networks.data.geometry import FieldOfViewd, SliceOrientationd
from networks.data.loading import LoadVolumed
from networks.data.slices import SliceDataset
from networks.engine.inferers import AutocastInferer, LabelInferer, has_bfloat16


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> str:
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return str(path)


class ByIntensity(nn.Module):
    """A stand-in network: class k where the image, scaled to 0..1, is k / 3."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4 and x.shape[2:] == (64, 64)
        return torch.cat([-((3 * x - k) ** 2) for k in range(4)], 1)


def anatomy() -> np.ndarray:
    """Asymmetric blocks of the values 0 to 3 in 48 x 40 x 5, so that any flip or shift shows."""
    volume = np.zeros((48, 40, 5), np.int16)
    volume[6:40, 8:34] = 1
    volume[10:24, 12:30, :4] = 2
    volume[26:38, 10:20, 1:] = 3
    volume[0, 0] = 3  # the intensity range is the same in each volume
    return volume


def assert_greatest(labels: Tensor, scores: Tensor) -> None:
    """Each label (B, 1, ...) has the greatest of its scores (B, C, ...); ties to rounding may go either way."""
    assert labels.dtype == torch.uint8
    chosen = scores.gather(1, labels.long())
    torch.testing.assert_close(chosen, scores.amax(1, keepdim=True), rtol=0, atol=1e-4)


def rotation(x: float, y: float, z: float) -> np.ndarray:
    (cx, cy, cz), (sx, sy, sz) = np.cos([x, y, z]), np.sin([x, y, z])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def affine(spacing=(1.5, 1.5, 8.0), turn=(0.0, 0.0, 0.0), origin=(10.0, -20.0, 30.0)) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = rotation(*turn) @ np.diag(spacing)
    matrix[:3, 3] = origin
    return matrix


def reorient(volume: np.ndarray, matrix: np.ndarray, axes: tuple[int, ...], flips: tuple[int, ...]):
    """The same anatomy at the same place, stored with other axes."""
    orientation = np.array([[axes.index(i), flips[axes.index(i)]] for i in range(3)])
    moved = nib.orientations.apply_orientation(volume, orientation)
    return moved, matrix @ nib.orientations.inv_ornt_aff(orientation, volume.shape)


STORED = {
    "plain": ((0, 1, 2), (1, 1, 1), {}),
    "flipped": ((0, 1, 2), (-1, -1, 1), {}),
    "against z": ((0, 1, 2), (1, 1, -1), {}),
    "permuted": ((2, 0, 1), (1, 1, 1), {}),
    "permuted and flipped": ((1, 2, 0), (-1, 1, -1), {}),
    "oblique": ((0, 1, 2), (1, 1, 1), {"turn": (0.3, -0.2, 0.4)}),
    "short axis": ((0, 1, 2), (1, 1, 1), {"turn": (1.2, 0.5, 0.0)}),
    "short axis, permuted": ((2, 1, 0), (1, -1, 1), {"turn": (1.2, 0.5, 0.0)}),
    "anisotropic": ((0, 1, 2), (1, 1, 1), {"spacing": (0.7, 1.1, 10.0)}),
}


@pytest.fixture
def infer(tmp_path):
    """Segment a folder with the bundle's own inference config and the stand-in network."""

    def infer(folder: Path, **values: object) -> Path:
        parser = ConfigParser()
        parser.read_config(ROOT / "bundles/fias_acdc/configs/inference.json")
        parser.read_meta(ROOT / "bundles/fias_acdc/configs/metadata.json")
        parser.update({"dataset_dir": str(folder), "output_dir": str(tmp_path / "out"), "image_size": 64})
        parser.update({"ckpt_dir": str(tmp_path)})  # no weights, whose values would be those of the run
        parser.update({"field_of_view": "whole", "intensity": "minmax"})
        parser.update({"network": ByIntensity(), "device": torch.device("cpu"), "bfloat16": False, **values})
        parser.get_parsed_content("evaluator").run()
        return tmp_path / "out"

    return infer


@pytest.mark.parametrize("stored", STORED)
def test_label_map_lies_on_its_image_however_it_is_stored(stored, infer, tmp_path):
    axes, flips, geometry = STORED[stored]
    volume, matrix = reorient(anatomy(), affine(**geometry), axes, flips)
    (tmp_path / "in").mkdir()
    source = save(tmp_path / "in" / "case.nii.gz", volume, matrix)
    result = infer(tmp_path / "in") / "case_seg.nii.gz"
    image, label = nib.load(source), nib.load(result)
    assert label.shape == image.shape and label.get_data_dtype() == np.uint8
    assert np.array_equal(label.affine, image.affine)
    assert np.mean(np.asarray(label.dataobj) == volume) > 0.97


def test_a_label_is_cut_as_its_image_whatever_the_last_digits_of_its_header(tmp_path):
    """Its place in the qform alone, 1 x 1 x 1.5 mm: just at the ratio that makes an axis the slice axis."""
    volume = np.random.default_rng(0).integers(0, 4, (20, 20, 20)).astype(np.int16)
    for n in range(20):
        turn = np.random.default_rng(n).uniform(-0.5, 0.5, 3) + [0, 1.4, 0]
        matrix = affine((1.0, 1.0, 1.5), turn)
        image, label = (nib.Nifti1Image(volume, matrix) for _ in range(2))
        label.set_qform(matrix, 1)
        label.set_sform(None, 0)
        for name, file in {"image": image, "label": label}.items():
            nib.save(file, tmp_path / f"{name}.nii")
        prepare = Compose([LoadVolumed(["image", "label"]), SliceOrientationd(["image", "label"])])
        found = prepare({name: str(tmp_path / f"{name}.nii") for name in ("image", "label")})
        assert torch.equal(found["image"].as_tensor(), found["label"].as_tensor().float())
        assert SliceOrientationd("image").slice_axis(torch.tensor(matrix), volume.shape) == 0
        back = prepare.transforms[1].inverse(found)
        assert np.array_equal(back["image"][0], volume) and np.array_equal(back["label"][0], volume)


def test_volumes_of_several_channels_get_one_label_map_each(infer, tmp_path):
    class First(ByIntensity):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :1])

    volume = np.stack([anatomy(), anatomy()[::-1]], -1)
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "case.nii.gz", volume, affine())
    label = nib.load(infer(tmp_path / "in", in_channels=2, network=First()) / "case_seg.nii.gz")
    assert label.shape == volume.shape[:3] and np.allclose(label.affine, affine())
    assert np.mean(np.asarray(label.dataobj) == anatomy()) > 0.97


@pytest.mark.parametrize("stored", STORED)
def test_a_field_of_view_is_segmented_and_the_rest_background(stored, infer, tmp_path):
    """48 mm about the centre: 32 of 48 and 40 voxels, or more than there is."""
    axes, flips, geometry = STORED[stored]
    inside = np.zeros_like(anatomy(), dtype=bool)
    inside[8:40, 4:36] = True
    if stored == "anisotropic":
        inside[:] = True
    volume, matrix = reorient(anatomy(), affine(**geometry), axes, flips)
    inside, _ = reorient(inside, matrix, axes, flips)
    (tmp_path / "in").mkdir()
    source = save(tmp_path / "in" / "case.nii.gz", volume, matrix)
    image, label = nib.load(source), nib.load(infer(tmp_path / "in", field_of_view=48.0) / "case_seg.nii.gz")
    assert label.shape == image.shape and np.array_equal(label.affine, image.affine)
    found = np.asarray(label.dataobj)
    assert not found[~inside].any() and np.mean(found[inside] == volume[inside]) > 0.97


def test_a_field_of_view_gives_all_cases_pixels_of_one_size():
    grids = [((50, 31, 3), (1.5, 1.5)), ((60, 60, 3), (1.0, 2.0))]
    labels = [MetaTensor(torch.ones(1, *shape), np.diag([*mm, 8, 1])) for shape, mm in grids]
    cut = FieldOfViewd(["image", "label"], 60)
    for label, side in zip(labels, ((40, 40), (60, 30)), strict=True):
        case = cut({"image": label * 5, "label": label})
        assert case["image"].shape == case["label"].shape == (1, *side, 3)
        assert torch.equal(case["image"] > 0, case["label"] > 0)
    whole = {"image": labels[0]}
    assert FieldOfViewd("image", None)(whole)["image"] is labels[0]
    for wrong in (0, True, float("inf"), "wide"):
        with pytest.raises(DataError, match=f"field_of_view.*{wrong!r}"):
            FieldOfViewd("image", wrong)


def test_flips_give_the_mean_of_the_four_mirrored_predictions():
    torch.manual_seed(0)
    network = random_heads(FIAS(1, 4)).eval()
    image = torch.rand(1, 1, 12, 10, 3).repeat_interleave(5, 2).repeat_interleave(4, 3)
    with torch.no_grad():
        labels = LabelInferer((60, 40), bfloat16=False, flips=True)(image, network)
        x = image[0].movedim(3, 0)
        views = [(), (2,), (3,), (2, 3)]
        mean = sum(network(x.flip(v)).flip(v).softmax(1) for v in views)
        mirrored = LabelInferer((60, 40), bfloat16=False, flips=True)(image.flip(2), network).flip(2)
    assert_greatest(labels[0].movedim(3, 0), mean)
    assert (labels == mirrored).float().mean() > 0.999
    assert not torch.equal(labels, LabelInferer((60, 40), bfloat16=False)(image, network))


class OneSided(ByIntensity):
    """A stand-in network: surely class 1 in the first half of the rows, rather class 0 in the second."""

    def forward(self, x: Tensor) -> Tensor:
        surely, rather = torch.tensor([0.0, 4, 0, 0]), torch.tensor([1.0, 0, -9, -9])
        rows = torch.stack([surely] * 32 + [rather] * 32, 1)
        return rows[None, :, :, None].expand(len(x), 4, 64, 64)


def test_flips_are_an_option_of_inference(infer, tmp_path):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "case.nii.gz", anatomy(), affine())
    shares = []
    for flips in (False, True):
        label = nib.load(infer(tmp_path / "in", network=OneSided(), flips=flips) / "case_seg.nii.gz")
        shares.append(np.mean(np.asarray(label.dataobj) == 1))
    assert shares[0] == pytest.approx(0.5, abs=0.05) and shares[1] == 1


def test_label_inferer_gives_the_plain_recipe_s_labels():
    """As MONAI's resize of the volume, SliceInferer, inverse of the resize, greatest class."""
    torch.manual_seed(0)
    network = random_heads(FIAS(1, 4)).eval()
    image = MetaTensor(torch.rand(1, 12, 10, 7).repeat_interleave(5, 1).repeat_interleave(4, 2))
    resize = Resized("image", [64, 64, -1], mode="trilinear")
    case = resize({"image": image})
    invert = Invertd("pred", resize, "image", nearest_interp=False)
    with torch.no_grad():
        case["pred"] = SliceInferer(roi_size=(64, 64), sw_batch_size=3, spatial_dim=2)(case["image"][None], network)[0]
        labels = LabelInferer((64, 64), batch_size=3, bfloat16=False)(image[None], network)
    plain = invert(case)["pred"].as_tensor()[None]
    assert labels.shape == (1, 1, 60, 40, 7) and len(labels.unique()) > 1
    assert_greatest(labels, plain)
    together = LabelInferer((64, 64), bfloat16=False)(torch.stack([image, image.flip(3)]), network)
    assert together.shape == (2, 1, 60, 40, 7)
    assert_greatest(together[:1], plain)


def test_label_inferer_gives_probabilities_where_they_are_asked_for_and_never_else():
    network, volume = FIAS(1, 4, deep_supervision=False), torch.rand(1, 1, 40, 50, 5)
    sample = LabelInferer((64, 64), batch_size=2, bfloat16=False, training=True)
    with torch.no_grad():
        pred = sample(volume, network.train())
        assert pred.shape == (1, 4, 64, 64, 5)
        torch.testing.assert_close(pred.sum(1), torch.ones(1, 64, 64, 5))
        assert not torch.equal(sample(volume, network), pred)
        plain = LabelInferer((64, 64), batch_size=2, bfloat16=False)
        assert torch.equal(sample(volume, network.eval()), plain(volume, network))
        with pytest.raises(DataError, match="eval"):  # forgotten
            LabelInferer((64, 64))(volume, network.train())


def test_more_classes_than_a_label_map_holds_are_refused():
    with torch.no_grad(), pytest.raises(DataError, match="300"):
        LabelInferer((32, 32))(torch.rand(1, 1, 32, 32, 1), torch.nn.Conv2d(1, 300, 1).eval())


def test_bfloat16_is_taken_where_asked_or_there(monkeypatch):
    def network(x):
        assert torch.is_autocast_enabled("cpu")
        return torch.cat([x, 1 - x], 1)

    assert LabelInferer((32, 32), bfloat16=True)(torch.zeros(1, 1, 32, 32, 2), network).all()
    for there in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda there=there: {"amx_bf16": there}, raising=False)
        assert has_bfloat16("cpu") == there
    with pytest.raises(AssertionError):
        LabelInferer((32, 32))(torch.zeros(1, 1, 32, 32, 2), network)


def test_training_in_bfloat16_gives_the_loss_single_precision():
    def network(x: Tensor) -> Tensor:
        types.append(torch.mm(x[0, 0], x[0, 0]).dtype)
        return torch.mm(x[0, 0], x[0, 0])

    types: list[torch.dtype] = []
    x = torch.rand(1, 1, 4, 4)
    for bfloat16, inside in ((True, torch.bfloat16), (None, torch.float32), (False, torch.float32)):
        assert AutocastInferer(bfloat16)(x, network).dtype == torch.float32
        assert types.pop() == inside
    maps = AutocastInferer(True)(x, lambda x: [network(x)] * 3)
    assert [m.dtype for m in maps] == [torch.float32] * 3


def test_single_slice_and_trailing_channel_keep_their_exact_shape(infer, tmp_path):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "single.nii.gz", anatomy()[:, :, 2:3], affine())
    save(tmp_path / "in" / "channel.nii.gz", anatomy()[..., None], affine())
    out = infer(tmp_path / "in")
    assert nib.load(out / "single_seg.nii.gz").shape == (48, 40, 1)
    assert nib.load(out / "channel_seg.nii.gz").shape == (48, 40, 5, 1)
    assert np.mean(np.asarray(nib.load(out / "single_seg.nii.gz").dataobj) == anatomy()[:, :, 2:3]) > 0.97


def test_contradictory_header_is_kept_so_that_every_reader_agrees(infer, tmp_path):
    """ACDC's headers: the sform is a 1 mm diagonal, the true spacing stands in pixdim."""
    (tmp_path / "in").mkdir()
    image = nib.Nifti1Image(anatomy(), np.eye(4))
    image.header.set_zooms((1.5, 1.5, 8.0))
    image.header.set_sform(np.diag([1.0, 1.0, 1.0, 1.0]), code=2)
    image.header.set_qform(None, code=0)
    image.header["pixdim"][1:4] = (1.5, 1.5, 8.0)
    source = tmp_path / "in" / "acdc.nii"
    source.write_bytes(nib.Nifti1Image(anatomy(), None, image.header).to_bytes())
    result = infer(tmp_path / "in") / "acdc_seg.nii.gz"
    a, b = nib.load(source), nib.load(result)
    assert np.array_equal(a.affine, b.affine) and np.array_equal(a.header["pixdim"], b.header["pixdim"])
    load = LoadImage(image_only=True)
    assert torch.equal(load(source).affine, load(result).affine)
    x, y = itk.imread(str(source)), itk.imread(str(result))
    for name in ("GetSpacing", "GetOrigin"):
        assert tuple(getattr(x, name)()) == tuple(getattr(y, name)())


def test_slice_axis_is_the_thick_one_else_the_superior_one():
    orient = SliceOrientationd("image")
    assert orient.slice_axis(affine(), (48, 40, 5)) == 2
    assert orient.slice_axis(affine(spacing=(3.0, 3.0, 3.0)), (9, 9, 9)) == 2
    assert orient.slice_axis(affine(spacing=(8.0, 1.5, 1.5)), (9, 9, 9)) == 0
    assert orient.slice_axis(affine(spacing=(1.5, 1.5, 1.5)), (9, 1, 9)) == 1
    assert orient.slice_axis(affine(turn=(1.3, 0.0, 0.0)), (48, 40, 5)) == 1


@pytest.fixture
def volumes(tmp_path) -> list[dict[str, str]]:
    """Four volumes of 3, 4, 5 and 6 slices; slice k of volume v holds 100 v + k, the first of each has no label."""
    data = []
    for v in range(4):
        image = np.zeros((8, 8, v + 3), np.float32) + 100 * v + np.arange(v + 3)
        label = np.ones_like(image, np.uint8)
        label[..., 0] = 0
        image_file = save(tmp_path / f"image{v}.nii.gz", image)
        data.append({"image": image_file, "label": save(tmp_path / f"label{v}.nii.gz", label)})
    return data


EVERY = [100 * v + k for v in range(4) for k in range(v + 3)]
LOAD = [LoadVolumed(["image", "label"])]


def visited(loader) -> list[int]:
    return [int(value) for batch in loader for value in batch["image"][:, 0, 0, 0]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stored", [False, True])
def test_every_slice_once_an_epoch_shuffled(volumes, workers, stored, tmp_path):
    dataset = SliceDataset(volumes, LOAD, cache_dir=tmp_path / "cache" if stored else None)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=workers)
    first, second = visited(loader), visited(loader)
    assert len(dataset) == 18 and sorted(first) == sorted(second) == EVERY
    assert first != second
    item = dataset[0]
    assert item["image"].shape == item["label"].shape == (1, 8, 8)


def test_what_is_stored_is_made_anew_when_files_or_transforms_change(volumes, tmp_path):
    def first(size: int) -> Tensor:
        return SliceDataset(volumes, [*LOAD, Resized(["image", "label"], (size, size, -1))], cache_dir=tmp_path)[0]

    assert [first(size)["image"].shape[-1] for size in (8, 16, 8)] == [8, 16, 8]
    before, file = first(8)["image"], nib.load(volumes[0]["image"])
    nib.save(nib.Nifti1Image(np.asarray(file.dataobj) + 7, file.affine), volumes[0]["image"])
    assert torch.equal(first(8)["image"], before + 7)


def test_volume_transforms_run_once_and_slice_transforms_at_each_visit(volumes):
    from monai.transforms import Lambdad, RandLambdad

    calls: Counter[str] = Counter()

    def count(name):
        return lambda x: (calls.update([name]), x)[1]

    dataset = SliceDataset(
        volumes,
        [*LOAD, Lambdad("image", count("volume"))],
        [RandLambdad("image", count("slice"), prob=1.0)],
    )
    for _ in range(2):
        visited(DataLoader(dataset, batch_size=3))
    assert calls == {"volume": 4, "slice": 36}


def test_slices_are_plain_tensors_so_that_a_compiled_network_is_one_graph(volumes):
    from monai.transforms import RandFlipd

    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    network = torch.compile(FIAS(1, 2), backend=count)
    batch = next(iter(DataLoader(SliceDataset(volumes, LOAD, [RandFlipd(["image", "label"], prob=1.0)]), batch_size=2)))
    network(batch["image"].repeat(1, 1, 8, 8))
    assert type(batch["image"]) is type(batch["label"]) is torch.Tensor
    assert len(graphs) == 1


def test_random_transforms_differ_between_visits_and_repeat_from_a_seed(volumes):
    from monai.transforms import RandScaleIntensityd

    dataset = SliceDataset(volumes, LOAD, [RandScaleIntensityd("image", factors=0.5, prob=1.0)])

    def epoch(seed):
        dataset.set_random_state(seed)
        return [float(dataset[i]["image"].mean()) for i in range(1, 18)]

    assert epoch(3) == epoch(3) != epoch(4)
    dataset.set_random_state(3)
    assert float(dataset[5]["image"].mean()) != float(dataset[5]["image"].mean())


def test_distributed_ranks_share_an_epoch_out(volumes):
    dataset = SliceDataset(volumes, LOAD)
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=True, seed=7)
        seen += visited(DataLoader(dataset, batch_size=2, sampler=sampler))
    assert sorted(seen) == EVERY


def test_empty_slices_are_dropped_or_visited_less_often(volumes):
    empty = {0, 100, 200, 300}
    assert sorted(visited(DataLoader(SliceDataset(volumes, LOAD, empty_weight=0)))) == sorted(set(EVERY) - empty)
    dataset = SliceDataset(volumes, LOAD, empty_weight=0.5)
    assert len(dataset) == 16
    loader = DataLoader(dataset, shuffle=True, batch_size=8)
    counts: Counter[int] = Counter()
    for _ in range(60):
        epoch = visited(loader)
        assert set(EVERY) - empty <= set(epoch)
        counts.update(value for value in epoch if value in empty)
    assert set(counts) == empty and sum(counts.values()) == 120 and min(counts.values()) > 10
    with pytest.raises(ValueError, match="empty_weight"):
        SliceDataset(volumes, LOAD, empty_weight=2)
    with pytest.raises(ValueError, match="dataset_dir"):
        SliceDataset([], LOAD)


def test_failed_write_leaves_nothing_behind(infer, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "case.nii.gz", anatomy(), affine())

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    with pytest.raises(RuntimeError):
        infer(tmp_path / "in")
    assert [p.name for p in (tmp_path / "out").rglob("*") if not p.name.startswith("inferring")] == []
