"""One Ray cluster for the whole test session, with its jobs server, closed to the outside."""

from collections.abc import Iterator

import pytest

from codec_dist.cluster_runtime import Session, ray_session
from codec_dist.config import ClusterSection


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Session]:
    """A local cluster of 4 CPUs; ``.address`` is Ray's, ``.dashboard`` the URL that takes jobs."""
    with ray_session(ClusterSection(), num_cpus=4, dashboard=True) as session:
        yield session
