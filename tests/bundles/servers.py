"""Servers that others wrote, started on loopback for as long as a test needs them: MONAI Label and Orthanc."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import requests

DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
"""Orthanc's plugin, where Debian's package orthanc-dicomweb puts it."""


@contextmanager
def monai_label(
    models: Path,
    studies: str | Path,
    python: str = sys.executable,
    conf: Mapping[str, str] | None = None,
    **environment: str,
) -> Iterator[str]:
    """The address of a MONAI Label server.

    Args:
        models: folder of the unpacked releases that it serves. The app is made beside it, if it is not there yet.
        studies: folder of images, or address of a DICOM server.
        python: of the environment that has MONAI Label.
        conf: settings of the app.
        environment: variables, beside those of this process.
    """
    app = models.parent / "monaibundle"
    if not (app / "model").is_dir():
        launch = "-m monailabel.main apps --download --name monaibundle --output".split()
        subprocess.run([python, *launch, str(app.parent)], check=True, stdout=subprocess.DEVNULL)
        shutil.copytree(models, app / "model")
    names = ",".join(sorted(folder.name for folder in models.iterdir()))
    port, command = _free_port(), [python, "-m", "monailabel.main", "start_server", "--app", app, "--studies", studies]
    command += ["--host", "127.0.0.1", "--port", port]
    for key, value in {"models": names, "zoo_source": "local", "sam2": "false", **(conf or {})}.items():
        command += ["--conf", key, value]
    # its own programs come first, such as dcmqi's and the Python that it starts
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "MONAI_LABEL_AUTO_UPDATE_SCORING": "false", **environment}
    with _started(command, app, own, f"http://127.0.0.1:{port}", "/info/") as address:
        yield address


@contextmanager
def orthanc(folder: Path) -> Iterator[str]:
    """The address of an Orthanc with DICOMweb, ``ADDRESS/dicom-web``, which keeps what it is sent in a folder."""
    port, config = _free_port(), folder / "orthanc.json"
    settings = {
        "Name": "test",
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "HttpPort": port,
        "RemoteAccessAllowed": False,
        "DicomServerEnabled": False,
        "Plugins": [str(DICOMWEB)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    config.write_text(json.dumps(settings))
    command = [shutil.which("Orthanc", path=f"/usr/sbin{os.pathsep}{os.environ['PATH']}"), config]
    with _started(command, folder, {}, f"http://127.0.0.1:{port}", "/system") as address:
        yield address


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def _started(
    command: Sequence[object], cwd: Path, environment: Mapping[str, str], address: str, ready: str
) -> Iterator[str]:
    """A server, until it is no longer needed; then the end of its log is printed."""
    file = cwd / "server.log"
    env = {**os.environ, **environment}
    env.pop("PYTHONPATH", None)
    with file.open("w") as log:
        pipes = {"stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen(list(map(str, command)), cwd=cwd, env=env, **pipes)
        try:
            _wait(f"{address}{ready}", process)
            yield address
        finally:
            with suppress(ProcessLookupError):  # it did not start, which the log tells of
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            print(file.read_text(errors="replace")[-6000:])


def _wait(url: str, process: subprocess.Popen, seconds: int = 600) -> None:
    for _ in range(seconds):
        assert process.poll() is None, "the server did not start"
        try:
            return requests.get(url).raise_for_status()
        except requests.ConnectionError:
            time.sleep(1)
    raise AssertionError("the server did not answer")
