"""How much memory rows may take is read from the machine, its container or the device."""

from collections.abc import Callable
from pathlib import Path

import pytest

from codec_dist.training import memory
from codec_dist.training.memory import FRACTION_FOR_ROWS, bytes_for_rows
from codec_dist.training.ranks import Ranks

GROUP = "memory.max", "memory.current", "memory.stat"


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Files of a control group, in place of this machine's."""

    def make(*contents: str) -> None:
        for name, content in zip(GROUP, contents, strict=True):
            (tmp_path / name).write_text(content)
        monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)

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
