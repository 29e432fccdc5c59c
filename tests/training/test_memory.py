"""How much memory rows may take is what the machine has free, divided by the ranks on it."""

from codec_dist.training.memory import FRACTION_FOR_ROWS, bytes_for_rows
from codec_dist.training.ranks import Ranks
from codec_dist.utils import available_memory


def test_ranks_on_one_host_share_its_memory() -> None:
    ranks = Ranks()
    ranks.on_this_host = 4
    # What is free changes between two looks at it.
    expected = available_memory() * FRACTION_FOR_ROWS / 4
    assert 0.5 * expected < bytes_for_rows(ranks) < 2 * expected
