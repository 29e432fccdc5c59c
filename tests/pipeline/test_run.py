"""A whole run on few digits: every stage leaves its files, is skipped when done, and is redone when it must be."""

import dataclasses
import itertools
import json
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from digits_config import digits_values
from safetensors.torch import save_file
from wandb_files import offline_files, records

from codec_dist.config import Config, load_config
from codec_dist.demo.training import train_classifier
from codec_dist.pipeline import STAGES, PipelineError, RunDirectory, part_images, run_stages
from codec_dist.pipeline.runner import current_stages
from codec_dist.shards import digits, pack
from codec_dist.store import ContributionStore, StoreError

pytestmark = pytest.mark.ray

VALUES = digits_values(
    {
        "run": {"directory": "run", "name": "few digits"},
        "data": {"shards": "shards", "limit": 420},
        "model": {"weights": "classifier.safetensors"},
        "attribution": {"layers": ["blocks.4", "blocks.5"]},
        "sae": {
            "groups": [{"architecture": {"name": "topk", "options": {"modes": 16, "k": 2}}, "training": {"epochs": 4}}]
        },
        "interventions": {"percentages": [5, 50], "off_targets": 2, "random_draws": 2, "images_per_class": 4},
        "visualization": {"modes": 2, "images": 2},
        "cluster": {"training_workers": 1},
    }
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> Config:
    folder = tmp_path_factory.mktemp("few digits")
    samples, classes = digits()
    pack(samples, folder / "shards", samples_per_shard=150, classes=classes)
    (folder / "config.yaml").write_text(yaml.safe_dump(VALUES))
    config = load_config(folder / "config.yaml")
    run_stages(config, ["prepare"])
    # The images do not depend on the weights, which do not exist yet.
    untrained = config.model_copy(update={"model": config.model.model_copy(update={"weights": "none"})})
    images, labels = part_images(untrained, "fit")
    save_file(train_classifier(images, labels, seed=0).state_dict(), folder / "classifier.safetensors")
    run_stages(config)
    return config


def changed(config: Config, *words: str) -> Config:
    return load_config(RunDirectory(config.run.directory).config, words)


def test_every_stage_leaves_its_files_and_a_record(config: Config) -> None:
    run = RunDirectory(config.run.directory)
    for stage in STAGES:
        assert run.record(stage.name) is not None, stage.name
        assert stage.complete(run), stage.name
    assert load_config(run.config) == config


def test_the_limit_takes_the_first_samples_and_the_split_covers_them(config: Config) -> None:
    run = RunDirectory(config.run.directory)
    split = pq.read_table(run.split)
    samples = ContributionStore(run.store).samples
    assert len(samples) == len(split) == 420
    assert set(zip(split["shard"].to_pylist(), split["key"].to_pylist(), strict=True)) == set(
        zip(samples["shard"].to_pylist(), samples["key"].to_pylist(), strict=True)
    )


def test_maps_show_images_of_the_evaluate_part_only(config: Config) -> None:
    run = RunDirectory(config.run.directory)
    split = pq.read_table(run.split)
    evaluate = set(split.filter(pc.equal(split["part"], "evaluate"))["key"].to_pylist())
    entries = json.loads((run.figures / "maps.json").read_text())
    assert entries
    assert {entry["key"] for entry in entries} <= evaluate
    assert all((run.figures / entry["map"]).is_file() for entry in entries)


def test_every_stage_logs_to_the_run(config: Config) -> None:
    lines = (RunDirectory(config.run.directory).path / "metrics.jsonl").read_text().splitlines()
    stages = {json.loads(line)["stage"] for line in lines}
    assert stages >= {"extract", "train", "summarize", "intervene", "visualize"}


def test_a_finished_run_is_left_as_it_is(config: Config) -> None:
    run = RunDirectory(config.run.directory)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    records = run_stages(config)
    after = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    assert [record.stage for record in records] == [stage.name for stage in STAGES]
    assert after == before


def test_a_stage_is_redone_when_its_own_settings_change_and_others_are_not(config: Config) -> None:
    run = RunDirectory(config.run.directory)
    before = {stage.name: run.record(stage.name) for stage in STAGES}
    run_stages(changed(config, "--interventions.random_draws", "3"))
    redone = {stage.name for stage in STAGES if run.record(stage.name) != before[stage.name]}
    assert redone == {"intervene", "report"}
    run_stages(config)


def test_deleted_output_and_output_of_an_earlier_format_are_made_again(config: Config) -> None:
    run = RunDirectory(config.run.directory)
    subjects, curves = run.interventions / "subjects.parquet", run.interventions / "curves.parquet"
    before = subjects.read_bytes(), curves.read_bytes()
    subjects.unlink()
    # An earlier version said what a point's `trials` were, and left another table.
    old = pq.read_table(curves).rename_columns({"subjects": "trials"}).replace_schema_metadata(None)
    pq.write_table(old, curves)
    pq.write_table(old, run.interventions / "trials.parquet")
    run_stages(config, ["intervene"])
    assert (subjects.read_bytes(), curves.read_bytes()) == before
    assert not (run.interventions / "trials.parquet").exists()


def test_what_is_found_of_a_class_does_not_depend_on_which_others_are_tested(config: Config) -> None:
    run = RunDirectory(config.run.directory)
    everything = pq.read_table(run.interventions / "subjects.parquet").to_pylist()
    run_stages(changed(config, "--interventions.targets", "2", "--interventions.batch_size", "7"), ["intervene"])
    some = pq.read_table(run.interventions / "subjects.parquet").to_pylist()
    targets = {row["target"] for row in some}
    assert len(targets) == 2
    assert some == [row for row in everything if row["target"] in targets]
    classes = pq.read_table(run.interventions / "classes.parquet")
    # Images of classes that nobody asks for are not run: two targets with two off-target classes each.
    assert len(set(classes["class"].to_pylist())) <= 6
    run_stages(config)


def test_causal_numbers_are_logged_with_their_nulls(config: Config) -> None:
    run = RunDirectory(config.run.directory)
    logged = {}
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        table = json.loads(line).get("table")
        if table and table["name"].startswith("interventions/"):
            logged[table["name"]] = [dict(zip(table["columns"], row)) for row in table["rows"]]
    for name in ("auc", "nulls", "curves"):
        assert logged[f"interventions/{name}"] == pq.read_table(run.interventions / f"{name}.parquet").to_pylist()


def test_a_store_of_another_config_is_refused_and_kept(config: Config) -> None:
    run = RunDirectory(config.run.directory)
    digest, resolved, split = ContributionStore(run.store).digest(), run.config.read_bytes(), run.split.read_bytes()
    with pytest.raises(StoreError, match=r"steps: 2 in the store, 3 requested"):
        run_stages(changed(config, "--attribution.method.options.steps", "3"))
    assert ContributionStore(run.store).digest() == digest
    # The run's own config still describes the run, so that it can go on.
    assert run.config.read_bytes() == resolved
    assert run.split.read_bytes() == split
    run_stages(load_config(run.config))


def test_a_stage_whose_input_is_of_other_settings_says_what_to_run(config: Config) -> None:
    with pytest.raises(PipelineError, match=r"`train` was run with other settings.*run `codec-dist train"):
        run_stages(changed(config, "--sae.groups.0.training.epochs", "5"), ["summarize"])
    run_stages(config)


def test_a_stage_without_its_input_says_what_to_run(config: Config, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"`intervene` needs `summarize` first: run `codec-dist summarize"):
        run_stages(changed(config, "--run.directory", str(tmp_path / "empty")), ["intervene"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--interventions.layers", "[blocks.9]"], r"interventions.layers: no SAE was trained for 'blocks.9'"),
        (["--interventions.quantities", "[contribution-negative]"], "no SAE was trained for 'contribution-negative'"),
    ],
)
def test_interventions_without_modes_are_refused(config: Config, words: list[str], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        run_stages(changed(config, *words), ["intervene"])
    run_stages(config)


def test_a_moved_run_is_still_done(config: Config, tmp_path: Path) -> None:
    run = RunDirectory(config.run.directory)
    moved = tmp_path / "moved"
    before = {path.relative_to(run.path): path.stat().st_mtime_ns for path in (run.path / "stages").iterdir()}
    run.path.rename(moved)
    try:
        run_stages(load_config(moved / "config.yaml"), [stage.name for stage in STAGES if stage.name != "report"])
        after = {path.relative_to(moved): path.stat().st_mtime_ns for path in (moved / "stages").iterdir()}
        assert after == before
    finally:
        moved.rename(run.path)


def test_a_shard_that_lost_its_marker_is_done_again(config: Config) -> None:
    run = RunDirectory(config.run.directory)
    digest = ContributionStore(run.store).digest()
    next(iter(sorted((Path(run.store) / "ledger").glob("*.json")))).unlink()
    run_stages(config, ["extract"])
    assert ContributionStore(run.store).complete
    assert ContributionStore(run.store).digest() == digest


def test_results_of_other_settings_are_not_current(config: Config) -> None:
    run_stages(config)
    run = RunDirectory(config.run.directory)
    assert current_stages(config, run) == {stage.name for stage in STAGES}
    other = changed(config, "--modes.correlation_threshold", "0.5")
    assert current_stages(other, run) == {"prepare", "extract", "train"}


def test_wandb_holds_training_history_and_the_table_of_top_modes(config: Config) -> None:
    names: set[str] = set()
    for file in offline_files(RunDirectory(config.run.directory).path):
        for record in records(file):
            names |= {item.key or ".".join(item.nested_key) for item in record.history.item}
    assert any(name.endswith("ev") for name in names), sorted(names)
    # A table is a nested value: where its rows are, and how many.
    assert "modes/top.nrows" in names, sorted(names)


@pytest.mark.slow
def test_unlabelled_images_run_to_the_report(tmp_path: Path, ray_cluster: object) -> None:
    samples, _ = digits()
    few = [dataclasses.replace(sample, label=None) for sample in itertools.islice(samples, 60)]
    pack(few, tmp_path / "shards", samples_per_shard=30, classes=None)
    values = VALUES | {"data": {"shards": "shards"}, "model": VALUES["model"] | {"weights": "none"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    config = load_config(tmp_path / "config.yaml")
    run_stages(config)
    run = RunDirectory(config.run.directory)
    assert json.loads((run.figures / "maps.json").read_text())
    assert len(pq.read_table(run.interventions / "subjects.parquet")) == 0
    assert run.report.is_file()
