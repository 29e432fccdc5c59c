"""How much memory a process may use is read from the machine and its containers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from codec_dist.utils import available_memory

VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"
VERSION_2 = "memory.max", "memory.current", "memory.stat"


@pytest.fixture
def container(tmp_path: Path) -> Callable[..., int]:
    """What is available by files of control groups; the process is in ``member`` (of version 2 by default)."""
    groups, membership = tmp_path / "groups", tmp_path / "membership"

    def make(*contents: str, folder: str = "", names: tuple[str, ...] = VERSION_2, member: str = "0::/\n") -> int:
        (groups / folder).mkdir(parents=True, exist_ok=True)
        for name, content in zip(names, contents, strict=True):
            (groups / folder / name).write_text(content)
        membership.write_text(member)
        return available_memory(groups, membership)

    return make


def test_a_container_leaves_its_limit_less_what_cannot_be_dropped(container: Callable[..., int]) -> None:
    found = container("10000000\n", "7000000\n", "anon 1000000\ninactive_file 5000000\nactive_file 1000000\n")
    assert found == 8_000_000


def test_without_a_limit_it_is_the_hosts_memory(container: Callable[..., int]) -> None:
    total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1])
    assert 0 < container("max\n", "7000000\n", "inactive_file 0\n") < total * 1024


def test_more_used_than_allowed_leaves_nothing(container: Callable[..., int]) -> None:
    assert container("5000000\n", "7000000\n", "inactive_file 0\n") == 0


def test_the_tightest_of_nested_groups_counts(container: Callable[..., int]) -> None:
    job = "0::/slurm/job_7/step_0\n"
    container("max\n", "0\n", "inactive_file 0\n", folder="slurm/job_7/step_0", member=job)
    container("6000000\n", "2000000\n", "inactive_file 1000000\n", folder="slurm/job_7", member=job)
    assert container("9000000\n", "2000000\n", "inactive_file 0\n", folder="slurm", member=job) == 5_000_000


@pytest.mark.parametrize("folder", ["memory/docker/abc", "memory"])  # the latter: a container that sees only its own
def test_groups_of_version_1_count(folder: str, container: Callable[..., int]) -> None:
    member = "4:memory:/docker/abc\n1:cpu:/docker/abc\n0::/\n"
    contents = ("7000000\n", "5000000\n", "inactive_file 9\ntotal_inactive_file 2000000\n")
    assert container(*contents, folder=folder, names=VERSION_1, member=member) == 4_000_000
