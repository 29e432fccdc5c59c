"""A small data set of real digits, and configs of runs over it."""

import functools
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from digits_config import digits_values

from codec_dist.config import Config, parse_config
from codec_dist.shards import digits, pack

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of 20 digits; not to be changed."""
    folder = tmp_path_factory.mktemp("digits") / "shards"
    samples, classes = digits()
    pack(islice(samples, 120), folder, name="digits", samples_per_shard=20, classes=classes)
    return folder


@pytest.fixture(scope="session")
def make_config_in(packed: Path) -> MakeConfig:
    """A config of a run in a folder; keyword arguments replace values of sections, ``cluster={"actors": 2}``."""

    def make(directory: Path, **sections: dict[str, Any]) -> Config:
        values: dict[str, dict[str, Any]] = {
            "run": {"directory": str(directory)},
            "data": {"shards": str(packed)},
            "attribution": {"microbatch": 8},
            "cluster": {"actors": 1},
            "tracking": {"mode": "disabled"},
        }
        return parse_config(digits_values(values, sections))

    return make


@pytest.fixture
def make_config(make_config_in: MakeConfig, tmp_path: Path) -> MakeConfig:
    """The same for a run of this test alone."""
    return functools.partial(make_config_in, tmp_path / "run")
