"""Selection on files: seeds are compared, the reason is kept, and nothing is compared twice."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from codec_dist.config import SelectionSettings
from codec_dist.modes import read_stability
from codec_dist.sae import build
from codec_dist.training import TrainingError, select_saes

CHANNELS, MODES = 6, 4
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves an SAE as a finished training leaves it: the folder's name says configuration and seed."""

    def make(
        name: str, dictionary: torch.Tensor | None = None, ev: float | None = 0.9, l0: float = 2.0, dead: int = 0
    ) -> Path:
        folder = tmp_path / "sae" / "layer" / "contribution-positive" / name
        sae = build("topk", {"modes": MODES, "k": 2}, CHANNELS, seed=hash(name) % 1000)
        if dictionary is not None:
            with torch.no_grad():
                sae.decoder.copy_(dictionary)
        sae.save(folder)
        frequency = [0.0] * dead + [0.5] * (MODES - dead)
        select = {"ev": ev, "l0": l0, "dead_fraction": dead / MODES, "frequency": frequency}
        place = {"layer": "layer", "quantity": "contribution-positive", "architecture": "topk"}
        (folder / "metrics.json").write_text(json.dumps({**place, "select": select, "evaluate": select}))
        return folder

    return make


def test_seeds_are_compared_mode_by_mode_and_the_best_found_again_is_chosen(tmp_path: Path, save: Save) -> None:
    axes = torch.eye(CHANNELS)
    saes = [
        save("cfg-s0", axes[:4]),
        save("cfg-s1", axes[[1, 0, 2, 3]]),  # the same modes in another order
        save("cfg-s2", axes[[0, 1, 4, 5]]),  # two of them are others
    ]
    chosen = select_saes(tmp_path / "sae", saes)
    # Modes 0 and 1 are in all three, 2 and 3 only in the other's one: cosines 1, and (1 + 0)/2.
    first, second, third = (read_stability(folder) for folder in saes)
    assert first.tolist() == [1, 1, 0.5, 0.5]
    assert second.tolist() == [1, 1, 0.5, 0.5]
    assert third.tolist() == [1, 1, 0, 0]
    assert chosen == {("layer", "contribution-positive"): saes[0]}
    selection = json.loads((tmp_path / "sae/selection.json").read_text())
    assert {row["folder"]: row["stability"] for row in selection["saes"]} == {
        "layer/contribution-positive/cfg-s0": 0.5,  # torch's median is the lower of the two in the middle
        "layer/contribution-positive/cfg-s1": 0.5,
        "layer/contribution-positive/cfg-s2": 0.0,
    }
    assert [row["folder"][-6:] for row in selection["saes"] if row["selected"]] == ["cfg-s0"]
    assert "of its 3 seeds" in selection["choices"][0]["reason"]
    assert json.loads((tmp_path / "sae/selected.json").read_text()) == {
        "layer": {"contribution-positive": "layer/contribution-positive/cfg-s0"}
    }


def test_dead_modes_are_not_compared_and_living_ones_without_partner_count_as_lost(tmp_path: Path, save: Save) -> None:
    axes = torch.eye(CHANNELS)
    saes = [save("cfg-s0", axes[:4]), save("cfg-s1", axes[[5, 1, 2, 3]], dead=1)]
    select_saes(tmp_path / "sae", saes)
    assert read_stability(saes[0]).tolist() == [0, 1, 1, 1]
    second = read_stability(saes[1])
    assert second[0].isnan()
    assert second[1:].tolist() == [1, 1, 1]


def test_weights_that_did_not_change_are_not_compared_again(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = torch.eye(CHANNELS)
    saes = [save("cfg-s0", axes[:4]), save("cfg-s1", axes[:4])]
    select_saes(tmp_path / "sae", saes)
    written = [(folder / "stability.json").stat().st_mtime_ns for folder in saes]
    select_saes(tmp_path / "sae", saes, SelectionSettings(l0=1))
    assert [(folder / "stability.json").stat().st_mtime_ns for folder in saes] == written
    save("cfg-s1", axes[2:])
    select_saes(tmp_path / "sae", saes)
    assert read_stability(saes[0]).tolist() == [0, 0, 1, 1]


def test_stability_of_an_earlier_plan_with_more_seeds_is_forgotten(tmp_path: Path, save: Save) -> None:
    saes = [save("cfg-s0"), save("cfg-s1")]
    select_saes(tmp_path / "sae", saes)
    assert read_stability(saes[0]) is not None
    select_saes(tmp_path / "sae", saes[:1])
    assert read_stability(saes[0]) is None


def test_another_criterion_is_applied_to_what_is_there(tmp_path: Path, save: Save) -> None:
    saes = [save("a-s0", ev=0.6, l0=1), save("b-s0", ev=0.9, l0=4), save("c-s0", ev=0.99, l0=32)]
    key = ("layer", "contribution-positive")
    assert select_saes(tmp_path / "sae", saes)[key] == saes[2]
    assert select_saes(tmp_path / "sae", saes, SelectionSettings(l0=4))[key] == saes[1]
    selection = json.loads((tmp_path / "sae/selection.json").read_text())
    assert selection["criterion"]["l0"] == 4
    assert [row["l0"] for row in selection["saes"]] == [1, 4, 32]


@pytest.mark.parametrize("content", ["{", "{}", '{"layer": "a", "quantity": "b", "architecture": "topk"}', "[1]"])
def test_metrics_that_cannot_be_read_are_named(tmp_path: Path, save: Save, content: str) -> None:
    folder = save("a-s0")
    (folder / "metrics.json").write_text(content)
    with pytest.raises(TrainingError, match=r"cannot read the metrics in .*a-s0"):
        select_saes(tmp_path / "sae", [folder])


def test_an_undefined_explained_variance_is_null_in_the_table(tmp_path: Path, save: Save) -> None:
    select_saes(tmp_path / "sae", [save("a-s0", ev=None)])
    (row,) = json.loads((tmp_path / "sae/selection.json").read_text())["saes"]
    assert row["ev"] is None
    assert row["selected"]
