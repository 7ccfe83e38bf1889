"""What weights were trained for: older ways of writing it, and what a run with other values is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from networks import DataError, check_export, check_values
from networks.data.intensity import ScaleIntensityByd
from networks.trained_for import differences, plain_intensity, plain_values, record_of, trained_values

PERCENTILES = {"_target_": "ScaleIntensityRangePercentilesd", "lower": 0.5, "upper": 99.5, "b_min": 0, "b_max": 1}
WAYS = {
    "minmax": {"_target_": "ScaleIntensityd", "keys": "image"},
    "percentiles 0.5 99.5": {**PERCENTILES, "keys": "image", "clip": True},
    "window -125 275": {
        "_target_": "ScaleIntensityRanged",
        **{"a_min": -125, "a_max": 275, "b_min": 0, "b_max": 1, "clip": True},
    },
    "window 0 255": {"_target_": "ScaleIntensityRanged", "a_min": 0, "a_max": 255, "b_min": 0, "b_max": 1},
}


@pytest.mark.parametrize("text", WAYS)
def test_older_weights_mean_what_the_plain_values_mean(text):
    older = {"image_size": 192, "field_of_view": None, "intensity": WAYS[text]}
    assert plain_values(older) == {"image_size": 192, "field_of_view": "whole", "intensity": text}
    assert not differences(older, {"image_size": 192, "field_of_view": "whole", "intensity": text})
    other = differences(
        {**older, "size": "small"}, {"image_size": 256, "field_of_view": 224, "intensity": "window 0 1"}
    )
    quoted = text if text == "minmax" else f'"{text}"'
    assert other == f"--image_size 192 --field_of_view whole --intensity {quoted}"


def test_one_way_of_scaling_written_otherwise_is_the_same():
    assert plain_intensity("percentiles  0.50 99.5") == plain_intensity("percentiles .5 99.50")
    assert plain_intensity("window 0 1234567") == "window 0 1234567" != plain_intensity("window 0 1234570")
    assert plain_intensity("window 1e6 2e6") == "window 1000000 2000000"


@pytest.mark.parametrize(
    "other",
    [
        {**WAYS["minmax"], "minv": -1},
        {**WAYS["minmax"], "channel_wise": True},
        {**PERCENTILES, "clip": False},
        {**PERCENTILES, "clip": True, "relative": True},
        {"_target_": "ScaleIntensityRanged", "a_max": 275, "b_min": 0, "b_max": 1, "clip": True},
    ],
)
def test_what_older_weights_saw_otherwise_is_not_taken_for_a_plain_way(other):
    assert plain_intensity(other) == other


def test_weights_that_were_replaced_keep_their_values(tmp_path):
    for weights, record in {"model.pt.previous": "model.json.previous", "a.b.safetensors": "a.b.json"}.items():
        (tmp_path / record).write_text(json.dumps({"image_size": 64}))
        assert record_of(tmp_path / weights) == tmp_path / record
        assert trained_values(tmp_path / weights, image_size=32) == {"image_size": 64}


def test_weights_that_tell_nothing_are_said_to(tmp_path, caplog):
    (tmp_path / "model.pt").touch()
    assert trained_values(tmp_path / "model.pt", image_size=32) == {"image_size": 32}
    assert "model.json" in caplog.text


def test_an_export_older_than_the_weights_is_refused(tmp_path, caplog):
    exported, weights = tmp_path / "model.ts", tmp_path / "model.pt"
    exported.touch()
    check_export(exported, weights)
    assert "model.ts" in caplog.text
    weights.touch()
    os.utime(exported, (1, 1))
    with pytest.raises(DataError, match="model.ts.*model.pt"):
        check_export(exported, weights)
    os.utime(weights, (0, 0))
    check_export(exported, weights)


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("minmax", lambda x: (x - x.min()) / (x.max() - x.min())),
        ("window -100 300", lambda x: ((x + 100) / 400).clip(0, 1)),
        ("percentiles 10 90", lambda x: ((x - np.percentile(x, 10)) / np.ptp(np.percentile(x, (10, 90)))).clip(0, 1)),
        ("zscore", lambda x: (x - x.mean()) / x.std()),
    ],
)
def test_each_way_scales_as_it_says(by, expected):
    image = np.random.default_rng(0).normal(50, 200, (1, 20, 20, 3)).astype(np.float32)
    scaled = ScaleIntensityByd("image", by)({"image": torch.from_numpy(image)})["image"]
    np.testing.assert_allclose(scaled, expected(image), atol=1e-4)


@pytest.mark.parametrize(
    "by", ["", "window", "window 3", "window 5 1", "window 0 abc", "window 0 inf", "percentiles -1 99", None]
)
def test_other_ways_are_refused(by):
    with pytest.raises(DataError, match="intensity"):
        ScaleIntensityByd("image", by)


@pytest.mark.parametrize("file", sorted(ROOT.glob("bundles/*/models/pretrained.json")), ids=lambda f: f.parts[-3])
def test_the_shipped_weights_values_are_plain(file: Path):
    values = plain_values(json.loads(file.read_text()))
    assert all(isinstance(value, (int, str)) for value in values.values()), values


def test_values_that_cannot_be_read_are_named(tmp_path):
    for content in ("{", "[1]", "null"):
        (tmp_path / "model.json").write_text(content)
        with pytest.raises(DataError, match="model.json"):
            check_values(tmp_path / "model.pt", {"image_size": 32})
    check_values(tmp_path / "none.pt", {"image_size": 32})


def test_weights_of_another_network_or_for_other_values_are_refused(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"network": "FIAS", "image_size": 64, "shipped": "a 0.1.0"}))
    check_values(tmp_path / "model.pt", {"network": "FIAS", "image_size": 64, "intensity": "minmax"})
    with pytest.raises(DataError, match="model.pt.*FIAS.*DANIE"):
        check_values(tmp_path / "model.pt", {"network": "DANIE", "image_size": 64})
    with pytest.raises(DataError, match="model.pt.*--image_size 64"):
        check_values(tmp_path / "model.pt", {"network": "FIAS", "image_size": 32})
    assert trained_values(tmp_path / "model.pt", image_size=32, size="large")["image_size"] == 64
    assert trained_values(tmp_path / "none.pt", image_size=32) == {"image_size": 32}
