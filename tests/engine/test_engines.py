"""The tests of the engines run in a process of their own: one that has OpenVINO loaded must not fork others.

A worker that was forked from it may wait for ever, as those of the data loaders in other tests are.
"""

from __future__ import annotations

from pathlib import Path

from conftest import run

ALONE = Path(__file__).with_name("engines_alone.py")


def test_the_engines():
    found = run("-m", "pytest", str(ALONE), "-p", "no:cacheprovider", "--tb=short", "-rs").stdout
    print(found)
    assert "." in found
