"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from networks.storage import whole_file, write_csv


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder" / "file.txt"
    with pytest.raises(RuntimeError), whole_file(target) as name:
        Path(name).write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with whole_file(target) as name:
        Path(name).write_text("whole")
    assert target.read_text() == "whole" and list(target.parent.iterdir()) == [target]


def test_a_file_has_the_rights_that_the_process_s_mask_leaves(monkeypatch, tmp_path):
    usual = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", None)  # of the whole process: other threads write meanwhile
        with whole_file(tmp_path / "a.txt"):
            pass
    finally:
        monkeypatch.undo()
        os.umask(usual)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_a_table_is_written_of_names_that_are_not_utf_8(tmp_path):
    write_csv(tmp_path / "a.csv", ["case"], [[b"M\xfcller".decode(errors="surrogateescape")]])
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines() == ["case", "M\\udcfcller"]
