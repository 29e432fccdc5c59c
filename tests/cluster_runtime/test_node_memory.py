"""What an actor may use is its share of what its node has free."""

import pytest
import ray

from codec_dist.cluster_runtime import Session, memory_shares
from codec_dist.config import ClusterSection
from codec_dist.utils import available_memory

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("actors", "cpus", "expected"), [(None, 1, 4), (None, 2, 2), (3, 1, 3), (9, 1, 4), (1, 4, 1)])
def test_a_node_is_divided_among_the_actors_that_it_has_room_for(
    ray_cluster: Session, actors: int | None, cpus: int, expected: int
) -> None:
    (share,) = memory_shares(ClusterSection(actors=actors, cpus_per_actor=cpus), "cpu")
    assert share.actors == expected
    assert share.device_bytes is None
    # Other processes of the machine take and free memory meanwhile.
    assert share.host_bytes < 0.9 * available_memory() / expected
    resources = next(node["Resources"] for node in ray.nodes() if node["Alive"])
    by_ray = resources["memory"] + resources["object_store_memory"]
    assert share.host_bytes <= 0.8 * by_ray / expected


def test_without_room_there_is_no_share(ray_cluster: Session) -> None:
    assert memory_shares(ClusterSection(cpus_per_actor=5), "cpu") == []
    assert memory_shares(ClusterSection(), "cuda") == []
