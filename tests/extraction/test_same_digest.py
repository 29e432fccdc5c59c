"""The digest depends on neither the order of shards nor how far batches are prefetched (actors: test_extraction)."""

from collections.abc import Callable
from pathlib import Path

import extraction_without_ray

from codec_dist.config import Config

MakeConfig = Callable[..., Config]


def test_prefetch_and_order_do_not_change_the_digest(make_config_in: MakeConfig, tmp_path: Path) -> None:
    digests = set()
    for depth, order in ((1, None), (2, [3, 0, 5, 1, 4, 2]), (9, [5, 4, 3, 2, 1, 0])):
        config = make_config_in(tmp_path / f"depth-{depth}", data={"prefetch": depth})
        digests.add(extraction_without_ray.extract_here(config, order))
    assert len(digests) == 1
