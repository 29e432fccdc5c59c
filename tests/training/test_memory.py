"""How much memory rows may take is read from the machine, its container or the device."""

from collections.abc import Callable
from pathlib import Path

import pytest

from codec_dist.training import memory
from codec_dist.training.memory import FRACTION_FOR_ROWS, bytes_for_rows
from codec_dist.training.ranks import Ranks

VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"
VERSION_2 = "memory.max", "memory.current", "memory.stat"


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Files of control groups, in place of this machine's; the process is in ``member`` (of version 2 by default)."""
    groups, membership = tmp_path / "groups", tmp_path / "membership"
    monkeypatch.setattr(memory, "CONTROL_GROUPS", groups)
    monkeypatch.setattr(memory, "MEMBERSHIP", membership)

    def make(*contents: str, folder: str = "", names: tuple[str, ...] = VERSION_2, member: str = "0::/\n") -> None:
        (groups / folder).mkdir(parents=True, exist_ok=True)
        for name, content in zip(names, contents, strict=True):
            (groups / folder / name).write_text(content)
        membership.write_text(member)

    return make


def test_a_container_leaves_its_limit_less_what_cannot_be_dropped(container: Callable[..., None]) -> None:
    container("10000000\n", "7000000\n", "anon 1000000\ninactive_file 5000000\nactive_file 1000000\n")
    assert bytes_for_rows(Ranks()) == int(8_000_000 * FRACTION_FOR_ROWS)


def test_ranks_on_one_host_share_its_memory(container: Callable[..., None]) -> None:
    container("10000000\n", "2000000\n", "inactive_file 0\n")
    ranks = Ranks()
    ranks.on_this_host = 4
    assert bytes_for_rows(ranks) == int(2_000_000 * FRACTION_FOR_ROWS)


def test_without_a_limit_it_is_the_hosts_memory(container: Callable[..., None]) -> None:
    container("max\n", "7000000\n", "inactive_file 0\n")
    assert 0 < bytes_for_rows(Ranks()) < memory._free_on_host()


def test_the_tightest_of_nested_groups_counts(container: Callable[..., None]) -> None:
    job = "0::/slurm/job_7/step_0\n"
    container("max\n", "0\n", "inactive_file 0\n", folder="slurm/job_7/step_0", member=job)
    container("6000000\n", "2000000\n", "inactive_file 1000000\n", folder="slurm/job_7", member=job)
    container("9000000\n", "2000000\n", "inactive_file 0\n", folder="slurm", member=job)
    assert bytes_for_rows(Ranks()) == int(5_000_000 * FRACTION_FOR_ROWS)


@pytest.mark.parametrize("folder", ["memory/docker/abc", "memory"])  # the latter: a container that sees only its own
def test_groups_of_version_1_count(folder: str, container: Callable[..., None]) -> None:
    member = "4:memory:/docker/abc\n1:cpu:/docker/abc\n0::/\n"
    contents = ("7000000\n", "5000000\n", "inactive_file 9\ntotal_inactive_file 2000000\n")
    container(*contents, folder=folder, names=VERSION_1, member=member)
    assert bytes_for_rows(Ranks()) == int(4_000_000 * FRACTION_FOR_ROWS)
