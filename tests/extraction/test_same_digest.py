"""The digest depends on neither the number of actors, nor the order of shards, nor how far batches are prefetched."""

from collections.abc import Callable
from pathlib import Path

import extraction_without_ray
import pytest

from codec_dist.cluster_runtime import Session
from codec_dist.config import Config
from codec_dist.extraction import extract
from codec_dist.extraction import worker as worker_module
from codec_dist.store import ContributionStore

MakeConfig = Callable[..., Config]


def test_prefetch_and_order_do_not_change_the_digest(
    make_config_in: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    for depth, order in ((1, None), (2, [3, 0, 5, 1, 4, 2]), (9, [5, 4, 3, 2, 1, 0])):
        monkeypatch.setattr(worker_module, "PREFETCH", depth)
        digests.add(extraction_without_ray.extract_here(make_config_in(tmp_path / f"depth-{depth}"), order))
    assert len(digests) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_four_actors_give_the_digest_of_one(ray_cluster: Session, make_config_in: MakeConfig, tmp_path: Path) -> None:
    config = make_config_in(tmp_path / "four", cluster={"actors": 4})
    assert extract(config).samples == 120
    expected = extraction_without_ray.extract_here(make_config_in(tmp_path / "one"))
    assert ContributionStore(config.store_location).digest() == expected
