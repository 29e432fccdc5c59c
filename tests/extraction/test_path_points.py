"""Points of the path are learned on images of the fit part, once per store, and every image's refinement is its own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from codec_dist.attribution import Attributor, IntegratedGradients
from codec_dist.cluster_runtime import Session
from codec_dist.config import Config
from codec_dist.extraction import ExtractionError, extract
from codec_dist.extraction.calibration import calibrate
from codec_dist.extraction.path_calibration import choose_probe
from codec_dist.extraction.plan import make_plan, open_store
from codec_dist.models import load_model
from codec_dist.shards import load_index, make_split, read_shard
from codec_dist.store import ContributionStore, StoreError
from codec_dist.utils import derive_seed

MakeConfig = Callable[..., Config]
pytestmark = pytest.mark.ray


def _with(options: dict[str, object]) -> dict[str, object]:
    method = {"name": "integrated_gradients", "options": options}
    return {"layers": ["blocks.3", "blocks.5"], "method": method, "microbatch": 8}


# Random weights leave one kink at the same place of every path, so all images are refined alike.
POINTS, ADAPTIVE = [0, 0.1, 0.4, 1], {"tolerance": 0.01, "most": 7}
REFINED = _with({"points": POINTS, "adaptive": ADAPTIVE})


@pytest.fixture(scope="module")
def refined(make_config_in: MakeConfig, ray_cluster: Session, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_config_in(tmp_path_factory.mktemp("refined"), attribution=REFINED)
    assert extract(config).samples == 120
    return config


def _store(config: Config) -> ContributionStore:
    return ContributionStore(Path(config.run.directory) / "store")


def test_the_probe_is_of_the_fit_part(refined: Config) -> None:
    plan, shards = make_plan(refined)
    index, split = load_index(refined.data.shards), refined.data.split
    seed = derive_seed(refined.run.seed, "split")
    table = make_split(index.samples(), split.fit, split.select, split.evaluate, seed)
    fit = set(table.filter(pc.equal(table["part"], "fit"))["key"].to_pylist())
    probe = choose_probe(plan, shards)
    keys = {key for part in probe for key in part.keys}
    assert keys <= fit
    assert len(keys) == min(48, len(fit))
    assert probe == choose_probe(plan, shards)


def test_refined_contributions_are_those_of_each_image_alone(refined: Config) -> None:
    store = _store(refined)
    loaded, index = load_model(refined.model, seed=refined.run.seed), load_index(refined.data.shards)
    samples = [sample for shard in index.shards for sample in read_shard(index.location, shard)][:12]
    method = IntegratedGradients(points=POINTS, adaptive=ADAPTIVE)
    attributor = Attributor(loaded.module, ["blocks.3", "blocks.5"], method)
    alone = [attributor(loaded.preprocessing(sample.image)[None]) for sample in samples]
    found = store.samples["path_steps"].to_pylist()[:12]
    assert found == [int(result.steps) for result in alone]
    assert all(3 < steps <= 7 for steps in found)
    for layer in store.layers:
        values = torch.cat([result[layer].positive for result in alone]).numpy()
        stored = store.read(layer, "contribution-positive")[:12]
        np.testing.assert_allclose(stored, values, rtol=1e-3, atol=1e-5 * values.max())


@pytest.mark.slow
@pytest.mark.parametrize("attribution", [REFINED, _with({"steps": 3})], ids=["refined", "learned"])
def test_a_store_resumed_or_made_by_other_actors_is_the_same_to_the_bit(
    make_config_in: MakeConfig, ray_cluster: Session, tmp_path: Path, attribution: dict[str, object]
) -> None:
    config = make_config_in(tmp_path / "run", attribution=attribution)
    extract(config)
    store = _store(config)
    digest, identity, settings = store.digest(), store.identity, store.settings
    assert ("path_points" in identity["attribution"]) == ("path" in settings) == (attribution is not REFINED)
    (tmp_path / "run" / "store" / "ledger" / "000001.json").unlink()
    (tmp_path / "run" / "store" / "samples.parquet").unlink()
    assert extract(config).shards_done == 1
    assert (_store(config).digest(), _store(config).identity) == (digest, identity)
    other = make_config_in(tmp_path / "other", attribution=attribution, cluster={"actors": 2})
    extract(other)
    assert (_store(other).digest(), _store(other).identity) == (digest, identity)
    assert _store(other).settings.get("path") == settings.get("path")


def test_another_rule_for_the_points_is_another_store(refined: Config) -> None:
    options = {"steps": 3, "adaptive": ADAPTIVE}
    with pytest.raises(StoreError, match=r"method\.options\.points.* in the store, .*learned.* requested"):
        extract(refined.model_copy(update={"attribution": type(refined.attribution).model_validate(_with(options))}))


def test_the_end_of_an_extraction_says_what_contributions_miss(
    make_config: MakeConfig, ray_cluster: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(attribution=_with({"steps": 2, "points": "uniform"}))
    summary = extract(config)
    store = _store(config)
    change = np.abs(store.samples["target_value"].to_numpy() - store.samples["baseline_value"].to_numpy())
    floor = 1e-3 * np.median(change)
    expected = {
        layer: np.median(np.abs(store.samples[f"completeness.{layer}"].to_numpy()) / np.maximum(change, floor))
        for layer in store.layers
    }
    assert summary.worst_residual == pytest.approx(max(expected.values()), rel=1e-4)
    said = capsys.readouterr().err
    for layer, residual in expected.items():
        assert f"{layer} {residual:.1%}" in said
    assert ("attribution.method.options.points" in said) == (max(expected.values()) > 0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"points": "learnt"},
        {"points": [0, 0.5]},
        {"points": [0, 0.7, 0.3, 1]},
        {"points": [0, 0.5, 1], "steps": 10},
        {"points": {"name": "power", "options": {"exponent": 0.5}}},
        {"adaptive": {"tolerance": 0}},
        {"adaptive": {"most": 2.5}},
        {"adaptive": {"until": 0.1}},
        {"adaptive": "yes"},
    ],
    ids=str,
)
def test_bad_settings_of_the_path_are_refused_before_anything_is_made(
    make_config: MakeConfig, options: dict[str, object]
) -> None:
    config = make_config(attribution=_with(options))
    with pytest.raises(Exception, match=r"point|adaptive") as caught:
        make_plan(config)
    assert type(caught.value).__name__ == "AttributionError"
    assert not (Path(config.run.directory) / "store").exists()


@pytest.mark.parametrize("points", [[0.5, 0.7, 1.0], [0.0, 0.2, 0.4, 1.0], [1.0], None], ids=str)
def test_a_store_whose_points_cannot_be_its_own_is_refused(make_config: MakeConfig, points: object) -> None:
    config = make_config(attribution=_with({"steps": 2}))
    plan, shards = make_plan(config)
    attribution = {**plan.identity["attribution"], **({} if points is None else {"path_points": points})}
    open_store(replace(plan, identity={**plan.identity, "attribution": attribution}), shards, {"device": "cpu"})
    with pytest.raises(ExtractionError, match="does not say at which points of the path"):
        calibrate(*make_plan(config))
