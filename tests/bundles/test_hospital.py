"""Label maps back to the DICOM server, and looked at: Orthanc, MONAI Label, and OHIF in Chromium, all on this machine.

    apt-get install orthanc orthanc-dicomweb chromium
    pip install ".[test]" playwright
    python3.11 -m venv label, and there: pip install "monailabel==0.8.5" dcmqi, and what bundles/README.md adds to it
    MONAI_LABEL_PYTHON=label/bin/python python -m pytest -m hospital tests/bundles/test_hospital.py

MONAI Label wants pydicom 2, and highdicom pydicom 3, so it has an environment of its own. It serves OHIF. What is not
installed is named as the reason for skipping. ``PICTURES=FOLDER`` keeps the pictures of OHIF.
"""

from __future__ import annotations

import colorsys
import importlib.util
import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
import requests
from conftest import ROOT, run, write_phase
from PIL import Image
from servers import DICOMWEB, monai_label, orthanc

from networks.results.pictures import COLOURS

PYTHON = os.environ.get("MONAI_LABEL_PYTHON", "")
HERE = {
    "orthanc: apt-get install orthanc": shutil.which("Orthanc", path=f"/usr/sbin:{os.environ['PATH']}"),
    "its DICOMweb: apt-get install orthanc-dicomweb": DICOMWEB.is_file(),
    "a browser: apt-get install chromium": shutil.which("chromium"),
    "playwright: pip install playwright": importlib.util.find_spec("playwright"),
    "highdicom: pip install .[dicom]": importlib.util.find_spec("highdicom"),
    "MONAI Label: name the Python of its environment by MONAI_LABEL_PYTHON": shutil.which(PYTHON),
    "dcmqi there: pip install dcmqi": shutil.which(Path(PYTHON).parent / "itkimage2segimage"),
}
pytestmark = [
    pytest.mark.hospital,
    pytest.mark.skipif(not all(HERE.values()), reason="; ".join(name for name, here in HERE.items() if not here)),
]

WEIGHTS = ROOT / "bundles" / "fias_acdc" / "models" / "pretrained.pt"
NAMES = ("right ventricle", "myocardium", "left ventricle")
PRIMARY = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
SOFTWARE = "--no-sandbox --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader --ignore-gpu-blocklist"
"""Options by which Chromium, also root's, draws without a graphics card."""

ALONE = ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    """A study with a beating heart, ``cine``, and one with a series of each of its first phases, ``phase1`` to 3."""
    root, folder = tmp_path_factory.mktemp("phantoms"), tmp_path_factory.mktemp("studies")
    size = ["--size", "96", "--slices", "3", "--frames", "6"]
    run("bundles/phantoms.py", "acdc", str(root), "--cine", "True", *size)
    shutil.copytree(root / "dicom" / "patient003", folder / "cine")
    (series,) = (folder / "cine").glob("*_sax")
    for number in range(3):
        write_phase(series, folder / f"phase{number + 1}", number)
    return folder


def phases(studies: Path, cache: Path) -> dict[str, str]:
    """Settings of MONAI Label: it lists MR of this one study, and keeps what it gets in a folder."""
    study = pydicom.dcmread(next((studies / "phase1").iterdir())).StudyInstanceUID
    listed = json.dumps({"Modality": "MR", "StudyInstanceUID": study})
    return {"MONAI_LABEL_DICOMWEB_SEARCH_FILTER": listed, "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(cache)}


@pytest.fixture(scope="module")
def pacs(studies, tmp_path_factory) -> Iterator[str]:
    """The address of an Orthanc that has the studies."""
    with orthanc(tmp_path_factory.mktemp("orthanc")) as address:
        for file in studies.rglob("*.dcm"):
            store(address, file.read_bytes())
        yield address


def store(pacs: str, data: bytes) -> None:
    """Send a DICOM object as STOW-RS has it."""
    kind = "application/dicom"
    body = b"\r\n".join([b"--part", f"Content-Type: {kind}".encode(), b"", data, b"--part--", b""])
    headers = {"Content-Type": f'multipart/related; type="{kind}"; boundary=part', "Accept": "application/dicom+json"}
    answer = requests.post(f"{pacs}/dicom-web/studies", data=body, headers=headers)
    assert answer.status_code == 200 and not answer.json().get("00081198", {}).get("Value"), answer.text


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The release of fias_acdc, with the weights that it comes with."""
    dist, models = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("app") / "model"
    (dist / "schema.json").write_text('{"type": "object"}')  # the model zoo's is elsewhere
    options = {"output_dir": dist, "weights": WEIGHTS, "schema": dist / "schema.json"}
    run("bundles/release.py", "fias_acdc", *(f"--{key}={value}" for key, value in options.items()))
    with zipfile.ZipFile(next(dist.glob("*.zip"))) as archive:
        archive.extractall(models)
    return models


@pytest.fixture(scope="module")
def label(models, studies, pacs, tmp_path_factory) -> Iterator[str]:
    """The address of a MONAI Label server."""
    cache = tmp_path_factory.mktemp("cache")
    with monai_label(models, f"{pacs}/dicom-web", PYTHON, **phases(studies, cache)) as address:
        yield address


@pytest.fixture(scope="module")
def look(label) -> Iterator[Callable[[str, str], np.ndarray]]:
    """``look(study, description)``: the picture that OHIF shows of a segmentation, whose names it lists."""
    from playwright.sync_api import sync_playwright

    def look(study: str, description: str) -> np.ndarray:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(180_000)
        page.goto(f"{label}/ohif/viewer?StudyInstanceUIDs={study}")
        page.locator("[data-cy=confirm-and-hide-button]").click()
        entries = page.locator("[data-cy=study-browser-thumbnail-no-image]")
        entries.filter(has_text=description).dblclick()
        page.get_by_text("Do you want to open this Segmentation?").wait_for()
        page.get_by_role("button", name="Yes").click()
        page.locator("[data-cy=panelSegmentation-btn]").click()
        for name in NAMES:
            page.get_by_text(name).first.wait_for()
        pane, picture = page.locator("[data-cy=viewport-pane]"), np.zeros((1, 1, 3))
        for _ in range(30):  # until it is drawn
            picture = np.asarray(Image.open(io.BytesIO(pane.screenshot())).convert("RGB"))
            if np.ptp(picture[_middle(picture)].astype(int), -1).max() > 100:
                break
            time.sleep(1)
        if "PICTURES" in os.environ:
            page.screenshot(path=Path(os.environ["PICTURES"]) / f"{study}_{description.removeprefix('S:')}.png")
        page.close()
        return picture[_middle(picture)]

    with sync_playwright() as playwright:
        options = {"executable_path": shutil.which("chromium"), "args": [*SOFTWARE.split(), *ALONE]}
        browser = playwright.chromium.launch(**options)
        print("Chromium", browser.version)
        yield look
        browser.close()


def _middle(picture: np.ndarray) -> tuple[slice, slice]:
    """The part of a viewport without its border and its words."""
    height, width = picture.shape[:2]
    return slice(height // 10, height - height // 10), slice(width // 6, width - width // 6)


def places(picture: np.ndarray, colours: tuple[tuple[int, int, int], ...]) -> list[np.ndarray]:
    """Row and column of the middle of each colour's pixels, and how many there are: grey images have no hue."""
    seen = np.array(Image.fromarray(picture).convert("HSV"), float)
    found = []
    for red, green, blue in colours:
        hue = 255 * colorsys.rgb_to_hsv(red, green, blue)[0]
        near = np.abs((seen[..., 0] - hue + 128) % 256 - 128) < 12
        rows, columns = np.nonzero(near & (seen[..., 1] > 50))
        found.append(np.array([rows.mean(), columns.mean(), len(rows)]) if len(rows) else np.zeros(3))
    return found


def is_heart(picture: np.ndarray, colours: tuple[tuple[int, int, int], ...]) -> None:
    """The right ventricle at the left of the picture, and the left one within the myocardium."""
    right, wall, left = places(picture, colours)
    print("row, column and pixels of each colour:", *(np.round(place) for place in (right, wall, left)))
    assert min(right[2], wall[2], left[2]) > 2000
    assert np.hypot(*(wall - left)[:2]) < 15 and right[1] < left[1] - 50


@pytest.mark.parametrize("attempt", range(1, 6))
def test_a_fresh_server_scores_three_images(studies, pacs, models, tmp_path, attempt):
    """By two threads, as is MONAI Label's default, which import the bundle's code while the other one does."""
    conf = {"epistemic_model": "fias_acdc", "epistemic_simulation_size": "2"}
    with monai_label(models, f"{pacs}/dicom-web", PYTHON, conf, **phases(studies, tmp_path)) as address:
        answer = requests.post(f"{address}/scoring/fias_acdc?run_sync=true", json={"device": "cpu"})
    print(f"server {attempt}: {answer.status_code} {answer.text}")
    assert answer.status_code == 200, answer.text
    assert answer.json()["executed"] == 3


def test_monai_label_s_segmentation_is_stored_and_ohif_shows_it(studies, pacs, label, look, tmp_path):
    source = pydicom.dcmread(next((studies / "phase1").iterdir()))
    url, series = f"{label}/infer/fias_acdc?image={source.SeriesInstanceUID}", source.SeriesInstanceUID
    info = [{"name": name, "color": colour} for name, colour in zip(NAMES, PRIMARY, strict=True)]
    info[0]["model_name"] = "fias_acdc"
    params = json.dumps({"device": "cpu", "label_info": info})
    answer = requests.post(f"{url}&output=dicom_seg", data={"params": params})
    assert answer.status_code == 200, answer.text
    seg = pydicom.dcmread(io.BytesIO(answer.content))
    assert [(one.SegmentNumber, one.SegmentLabel) for one in seg.SegmentSequence] == [*enumerate(NAMES, 1)]
    assert (
        seg.StudyInstanceUID == source.StudyInstanceUID and seg.ReferencedSeriesSequence[0].SeriesInstanceUID == series
    )
    answer = requests.post(f"{url}&output=image", data={"params": params})
    assert answer.status_code == 200, answer.text
    where = f"{label}/datastore/label?image={series}&tag=final"
    answer = requests.put(where, files={"label": ("label.nii.gz", answer.content)}, data={"params": params})
    assert answer.status_code == 200, answer.text
    query = {"Modality": "SEG", "StudyInstanceUID": source.StudyInstanceUID}
    assert (
        len(requests.get(f"{pacs}/dicom-web/series", query, headers={"Accept": "application/dicom+json"}).json()) == 1
    )
    is_heart(look(source.StudyInstanceUID, "S:300"), PRIMARY)


def test_ohif_shows_the_segmentations_that_inference_writes(studies, pacs, look, tmp_path):
    """Of a volume, and of the first phase of a cine: of a cine's series, OHIF 3 shows the first phase."""
    (tmp_path / "in").mkdir()
    for name in ("phase2", "cine"):
        shutil.copytree(studies / name, tmp_path / "in" / name)
    options = {"dataset_dir": tmp_path / "in", "output_dir": tmp_path / "out", "device": "cpu", "bfloat16": False}
    config = ["inferring", "--config_file", "bundles/fias_acdc/configs/inference.json", "--dicom_seg", "True"]
    run(
        "-m",
        "monai.bundle",
        "run",
        *config,
        f"--weights={WEIGHTS}",
        *(f"--{key}={value}" for key, value in options.items()),
    )
    for name in ("phase2_seg.dcm", "cine_seg_phase01.dcm"):
        (file,) = (tmp_path / "out").rglob(name)
        store(pacs, file.read_bytes())
        seg = pydicom.dcmread(file)
        is_heart(look(seg.StudyInstanceUID, f"S:{seg.SeriesNumber}"), COLOURS[:3])
