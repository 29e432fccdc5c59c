"""An architecture of the user's, named by its import path as targets and methods are."""

import json
from pathlib import Path

import pytest
import torch

from codec_dist.sae import SaeError, SparseAutoencoder, StackedAutoencoder, build

PATH = "threshold_autoencoder:ThresholdAutoencoder"


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


def test_it_is_built_saved_and_loaded_by_its_path(tmp_path: Path) -> None:
    sae = build(PATH, {"modes": 6, "threshold": 0.3}, channels=4, seed=1)
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    sae.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == PATH
    same = SparseAutoencoder.load(tmp_path)
    assert type(same) is type(sae)
    loadings = sae.eval().encode(rows)
    torch.testing.assert_close(same.encode(rows), loadings, rtol=0, atol=0)
    assert 0 < (loadings == 0).float().mean() < 1
    assert loadings[loadings > 0].min() > 0.3


def test_a_stack_gives_back_members_that_can_be_saved() -> None:
    members = [build(PATH, {"modes": 6}, channels=4, seed=seed) for seed in (0, 1)]
    stack = StackedAutoencoder(members)  # type: ignore[arg-type]
    assert [member.architecture for member in stack.unstack()] == [PATH, PATH]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("threshold_autoencoder:PLAIN_FUNCTION", "no subclass of SparseAutoencoder"),
        ("threshold_autoencoder:Missing", "cannot import the SAE architecture"),
        ("thresholt", "unknown SAE architecture .*import path"),
    ],
)
def test_what_is_no_architecture_is_refused(path: str, message: str) -> None:
    with pytest.raises(SaeError, match=message):
        build(path, {}, channels=4)
    with pytest.raises(SaeError, match="has no option 'treshold'"):
        build(PATH, {"treshold": 1}, channels=4)
