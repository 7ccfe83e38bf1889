"""How an error's text reaches a person: whole, also through a loader's workers."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, Dataset

from networks import DataError

TEXT = "Cannot read weights from a.pt. (DataError: inner text)\nSecond line."


class Broken(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise DataError(TEXT)


def test_an_error_keeps_its_whole_text():
    assert str(DataError(TEXT)) == TEXT


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_worker_is_told_without_its_traceback(num_workers):
    with pytest.raises(DataError) as error:
        next(iter(DataLoader(Broken(), num_workers=num_workers)))
    assert str(error.value) == TEXT
