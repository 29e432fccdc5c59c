"""Configs that come with the package are valid, and the sweep is the paper's."""

import itertools
from pathlib import Path

import pytest
from torch import device

from codec_dist.config import ConfigError, load_config, packaged_config, packaged_names
from codec_dist.sae import ARCHITECTURES


@pytest.mark.parametrize("name", packaged_names())
def test_every_packaged_config_can_be_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(packaged_config(name))
    load_config(tmp_path / "config.yaml")


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean sweep"):
        packaged_config("swepe")


def test_sweep_has_27_configurations_of_3_seeds_at_4_layers(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(packaged_config("sweep"))
    config = load_config(tmp_path / "sweep.yaml")
    (group,) = config.sae.groups
    points = list(itertools.product(*group.grid.values()))
    assert (len(points), len(group.seeds), len(config.attribution.layers)) == (27, 3, 4)
    assert dict(group.grid) == {"expansion": (1, 3, 5), "threshold": (0.5, 0.7, 0.9), "l1": (0, 1e-2, 1e-4)}
    for point in points:
        options = {**group.architecture.options, **dict(zip(group.grid, point, strict=True))}
        with device("meta"):
            sae = ARCHITECTURES.build(group.architecture.name, options, channels=512)
        assert sae.modes == point[0] * 512
        assert sae.options["hidden"] == 512
