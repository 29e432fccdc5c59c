"""One Ray cluster for the whole test session, with its jobs server, closed to the outside."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from codec_dist.cluster_runtime import Session, ray_session
from codec_dist.config import ClusterSection
from codec_dist.utils import environment

# Actors find the models of tests here.
MODELS = Path(__file__).parent / "extraction"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Session]:
    """A local cluster of 4 CPUs; ``.address`` is Ray's, ``.dashboard`` the URL that takes jobs."""
    with ExitStack() as stack:
        paths = [str(MODELS), *filter(None, [os.environ.get("PYTHONPATH")])]
        with environment({"PYTHONPATH": os.pathsep.join(paths)}):
            session = stack.enter_context(ray_session(ClusterSection(), num_cpus=4, dashboard=True))
        yield session
