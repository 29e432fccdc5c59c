"""Files of a summary that could not be written leave nothing behind."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from small_disk import small_disk

from codec_dist.modes.summary_files import SummaryWriter, write_statistics


def write_nothing(folder: Path) -> None:
    with SummaryWriter(folder):
        pass


def write_no_statistics(folder: Path) -> None:
    write_statistics(folder, {})


@pytest.mark.parametrize("write", [write_nothing, write_no_statistics])
def test_where_the_disk_is_full_no_part_of_a_summary_is_left(write: Callable[[Path], None], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "128k") as disk:
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file:
            status = os.statvfs(disk)
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_bsize)
        with pytest.raises(OSError, match="No space left"):
            write(disk / "modes")
        assert not list((disk / "modes").iterdir())
        filler.unlink()
        write(disk / "modes")
        assert not list(disk.rglob("*.partial"))
        assert list((disk / "modes").glob("*.zarr"))
