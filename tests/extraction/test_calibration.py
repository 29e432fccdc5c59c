"""What a config leaves to measuring is measured once, kept with the store, and the same for all who resume."""

from collections.abc import Callable
from pathlib import Path

import extraction_without_ray
import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from codec_dist.attribution import (
    AttributionError,
    Attributor,
    DataStatistics,
    Entropy,
    IntegratedGradients,
    Rank,
    Surprisal,
)
from codec_dist.cluster_runtime import Session
from codec_dist.config import Config
from codec_dist.extraction import ExtractionError, extract
from codec_dist.extraction.calibration import calibrate
from codec_dist.extraction.plan import make_plan, open_store
from codec_dist.models import load_model
from codec_dist.shards import load_index, make_split, read_shard
from codec_dist.store import ContributionStore, StoreError
from codec_dist.utils import derive_seed

MakeConfig = Callable[..., Config]
pytestmark = [pytest.mark.ray, pytest.mark.slow]

SURPRISAL = {
    "layers": ["blocks.5"],
    "method": {"name": "integrated_gradients", "options": {"steps": "auto", "tolerance": 0.2, "baseline": "mean"}},
    "target": {"name": "surprisal"},
    "further_targets": [{"name": "rank", "options": {"rank": 2}}, {"name": "entropy"}],
    "microbatch": 8,
}


def _images(config: Config, part: str | None = None) -> tuple[torch.Tensor, list[str]]:
    """All images of the run in the store's order, or those of one part, with their keys."""
    loaded, index = load_model(config.model, seed=config.run.seed), load_index(config.data.shards)
    split = config.data.split
    table = make_split(index.samples(), split.fit, split.select, split.evaluate, derive_seed(config.run.seed, "split"))
    wanted = table if part is None else table.filter(pc.equal(table["part"], part))
    keys = set(wanted["key"].to_pylist())
    samples = [sample for shard in index.shards for sample in read_shard(index.location, shard) if sample.key in keys]
    return torch.stack([loaded.preprocessing(sample.image) for sample in samples]), [each.key for each in samples]


@pytest.fixture(scope="module")
def measured(make_config_in: MakeConfig, ray_cluster: Session, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_config_in(tmp_path_factory.mktemp("calibrated"), attribution=SURPRISAL)
    assert extract(config).samples == 120
    return config


def test_a_target_and_a_baseline_that_need_the_data_set_are_those_of_its_fit_part(measured: Config) -> None:
    store = ContributionStore(Path(measured.run.directory) / "store")
    loaded = load_model(measured.model, seed=measured.run.seed)
    fit, _ = _images(measured, "fit")
    statistics = DataStatistics.measure(loaded.module, fit.split(8))
    method = IntegratedGradients(baseline="mean", points=_path_points(store)).fitted(statistics)
    targets = [Surprisal().fitted(statistics), Rank(2), Entropy()]
    images, keys = _images(measured)
    expected = Attributor(loaded.module, ["blocks.5"], method, targets, microbatch=8)(images)
    samples = store.samples
    assert samples["key"].to_pylist() == keys
    assert store.targets == ("surprisal", "rank_2", "entropy")
    for target, result in {"surprisal": expected, **expected.others}.items():
        of_target = "" if target == "surprisal" else f"[{target}]"
        for sign in ("positive", "negative"):
            found = store.read("blocks.5", f"contribution{of_target}-{sign}")
            values = getattr(result["blocks.5"], sign).numpy()
            np.testing.assert_allclose(found, values, rtol=1e-3, atol=1e-5 * np.abs(values).max())
        change = result.target_value - result.baseline_value
        stored = np.asarray(samples[f"target_value{of_target}"]) - np.asarray(samples[f"baseline_value{of_target}"])
        np.testing.assert_allclose(stored, change.numpy(), rtol=1e-3, atol=1e-4)
        residual = np.asarray(samples[f"completeness{of_target}.blocks.5"])
        np.testing.assert_allclose(residual, result["blocks.5"].completeness.numpy(), rtol=1e-2, atol=1e-3)


def _path_points(store: ContributionStore) -> list[float]:
    points = store.identity["attribution"]["path_points"]
    assert points[0] == 0
    assert points[-1] == 1
    return list(points)


def test_the_chosen_points_and_what_was_measured_are_kept(measured: Config) -> None:
    store = ContributionStore(Path(measured.run.directory) / "store")
    found = store.settings["path"]
    *before, last = found["residuals_by_steps"]
    assert last == [len(_path_points(store)) - 1, found["probe_residual"]]
    assert found["probe_layer"] == "blocks.5"
    assert last[1] < 0.2
    assert all(residual >= 0.2 for _, residual in before)


def test_a_resumed_run_takes_what_the_store_was_made_with(measured: Config) -> None:
    run = Path(measured.run.directory)
    store = ContributionStore(run / "store")
    digest, settings = store.digest(), store.settings
    (run / "statistics.safetensors").unlink()  # measured again, to the same numbers
    (run / "store" / "ledger" / "000003.json").unlink()
    (run / "store" / "samples.parquet").unlink()
    assert extract(measured).shards_done == 1
    store = ContributionStore(run / "store")
    assert store.digest() == digest
    assert store.settings == settings


def test_statistics_that_are_not_those_of_the_store_are_measured_anew(measured: Config) -> None:
    run = Path(measured.run.directory)
    path = run / "statistics.safetensors"
    kept = path.read_bytes()
    other = DataStatistics.load(path)
    other.mean_image += 1
    other.save(path)
    assert path.read_bytes() != kept
    (run / "store" / "ledger" / "000002.json").unlink()
    assert extract(measured).shards_done == 1
    assert path.read_bytes() == kept


def test_a_tolerance_that_no_steps_reach_is_refused_before_any_actor_starts(make_config: MakeConfig) -> None:
    method = {"name": "integrated_gradients", "options": {"steps": "auto", "tolerance": 1e-12}}
    with pytest.raises(AttributionError, match="with 60 steps the median relative residual"):
        extract(make_config(attribution={"layers": ["blocks.5"], "method": method, "microbatch": 8}))
    assert not (Path(make_config().run.directory) / "store").exists()


def test_an_automatic_microbatch_is_chosen_once_and_kept_by_all_who_resume(
    ray_cluster: Session, make_config_in: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    automatic = {"microbatch": "auto"}
    config = make_config_in(tmp_path / "first", attribution=automatic)
    plan, shards = make_plan(config)
    calibrated, _ = calibrate(plan, shards)
    # Of a small model on small images the most that may pass does fit.
    assert calibrated.microbatch == ContributionStore(plan.store).settings["microbatch"] == 64
    assert ContributionStore(plan.store).identity["attribution"]["microbatch"] == "auto"
    assert "microbatch 64 chosen" in capsys.readouterr().err
    calibrated, _ = calibrate(plan, shards)
    assert calibrated.microbatch == 64
    assert "chosen" not in capsys.readouterr().err

    # A store that was begun where 3 images fitted.
    config = make_config_in(tmp_path / "second", attribution=automatic)
    plan, shards = make_plan(config)
    open_store(plan, shards, {"device": "cpu", "microbatch": 3})
    extract(config)
    given = make_config_in(tmp_path / "third", attribution={"microbatch": 3})
    assert ContributionStore(plan.store).digest() == extraction_without_ray.extract_here(given)

    # One that was begun where more fitted than here: it keeps its number, and a line says so.
    config = make_config_in(tmp_path / "fourth", attribution=automatic)
    plan, shards = make_plan(config)
    open_store(plan, shards, {"device": "cpu", "microbatch": 10**7})
    capsys.readouterr()
    assert calibrate(plan, shards)[0].microbatch == 10**7
    assert "10000000" in capsys.readouterr().err

    other = make_config_in(tmp_path / "first", attribution={"microbatch": 64})
    with pytest.raises(StoreError, match=r"attribution\.microbatch: auto in the store, 64 requested"):
        make_plan(other)


@pytest.mark.parametrize(
    "damaged",
    [
        {"device": "tpu"},
        {"device": ["cpu"]},
        {"device": "cpu", "optimizations": {"inplace": True}},
        {"device": "cpu", "optimizations": {"inplace": 1, "fold_batchnorm": 0, "channels_last": 0, "fused": 0}},
        {"device": "cpu", "optimizations": [True, True, True, True]},
    ],
)
def test_settings_of_a_store_that_cannot_be_are_refused_with_its_name(
    ray_cluster: Session, make_config: MakeConfig, damaged: dict[str, object]
) -> None:
    plan, shards = make_plan(make_config())
    open_store(plan, shards, damaged)
    with pytest.raises(ExtractionError, match="store"):
        calibrate(plan, shards)
