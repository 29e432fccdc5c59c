"""From a store, a split and SAEs to the files of the stage: a map-reduce that equals one look at all rows."""

import functools
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr

from codec_dist.modes import (
    FoldInputs,
    ModesError,
    ModeSummary,
    SummaryTask,
    SummaryWriter,
    assign_parts,
    finish_summary,
    measure_shards,
    parse_concepts,
    statistics_kinds,
    summarize_shards,
    summary_tasks,
    write_stability,
    write_statistics,
)
from codec_dist.sae import SparseAutoencoder, build
from codec_dist.statistics import hoyer
from codec_dist.store import BlockWriter, ContributionStore, create_store, finish_store

LAYERS = {"blocks.0": 6, "blocks.1@input:heads": 9}
SHARDS = (("digits-0", 40), ("digits-1", 33), ("digits-2", 1))
NAMES = ("zero", "one", "two", "never")
THRESHOLD = 0.2
LAYER, QUANTITY = "blocks.1@input:heads", "contribution-positive"


class Run:
    """A run as the stages before leave it, and all its rows in memory."""

    def __init__(self, path, labelled=True):
        self.path, generator = path, np.random.default_rng(0)
        quantities = [f"{kind}-{sign}" for kind in ("contribution", "activation") for sign in ("positive", "negative")]
        create_store(
            path / "store", identity={}, layers=LAYERS, targets=["top_1"], quantities=quantities, shards=SHARDS
        )
        self.rows = {(layer, quantity): [] for layer in LAYERS for quantity in quantities}
        samples = []
        for number, (shard, count) in enumerate(SHARDS):
            labels = generator.integers(-1, 3, count) if labelled else np.full(count, -1)
            values = {}
            for layer, quantity in self.rows:
                array = np.abs(generator.normal(size=(count, LAYERS[layer]))) + np.eye(LAYERS[layer])[labels] * 2
                array[:, 0] = 0  # a channel that never fires
                values[layer, quantity] = (array if quantity.endswith("positive") else -array).astype(np.float32)
                self.rows[layer, quantity].append(values[layer, quantity])
            table = pa.table(
                {
                    "key": [f"{shard}/{row}" for row in range(count)],
                    "label": pa.array([None if label < 0 else int(label) for label in labels], pa.int32()),
                    "prediction": pa.array([0] * count, pa.int32()),
                    "target_value": pa.array([0.0] * count),
                    "baseline_value": pa.array([0.0] * count),
                }
            )
            BlockWriter(path / "store").write(number, values, table)
            samples += [(shard, key, label) for key, label in zip(table["key"].to_pylist(), labels, strict=True)]
        finish_store(path / "store")
        self.rows = {name: np.concatenate(arrays) for name, arrays in self.rows.items()}
        self.shards, self.keys, labels = zip(*samples, strict=True)
        self.labels = np.array(labels)
        self.parts = np.array(["fit", "select", "evaluate", "evaluate"])[generator.integers(0, 4, len(samples))]
        order = generator.permutation(len(samples))  # the split need not be in the store's order
        split = {"shard": self.shards, "key": self.keys, "label": self.labels, "part": self.parts}
        pq.write_table(
            pa.table({name: np.array(column)[order].tolist() for name, column in split.items()}), path / "split.parquet"
        )
        self.inputs = FoldInputs(path / "store", path / "split.parquet", len(NAMES) if labelled else 0, images=4)
        self.selected = {
            layer: {q: f"{number}/{q}" for q in (QUANTITY, "activation-positive")}
            for number, layer in enumerate(LAYERS)
        }
        for number, (layer, folders) in enumerate(self.selected.items()):
            for folder in folders.values():
                sae = build("topk", {"modes": 12, "k": 3}, LAYERS[layer], seed=number)
                sae.save(path / "sae" / folder)
        # One of the SAEs was trained with other seeds, and its first mode is dead.
        self.stability = torch.tensor([torch.nan, *(place / 10 for place in range(11))], dtype=torch.float64)
        write_stability(path / "sae" / self.selected[LAYER][QUANTITY], self.stability, {})

    def loadings(self, layer, quantity):
        sae = SparseAutoencoder.load(self.path / "sae" / self.selected[layer][quantity])
        return sae.encode(torch.from_numpy(self.rows[layer, quantity])).detach().double().numpy()

    def correlation(self, loadings, part, classes):
        inside = (self.parts == part) & (self.labels >= 0)
        mask = np.isin(self.labels[inside], classes)
        found = [
            np.corrcoef(column, mask)[0, 1] if len(set(column)) > 1 and len(set(mask)) > 1 else np.nan
            for column in loadings[inside].T
        ]
        return np.array(found)

    def summarize(self, directory, groups=((0,), (2, 1)), concepts=None):
        with SummaryWriter(directory) as writer:
            for task in summary_tasks(self.path / "sae", self.selected):
                folds = [summarize_shards(self.inputs, task, shards) for shards in groups]
                total = functools.reduce(lambda first, second: first.merge(second), folds)
                names = NAMES[: self.inputs.classes]
                for entry in finish_summary(self.inputs, task, total, names, THRESHOLD, concepts):
                    writer.add(entry)
        kinds = statistics_kinds(ContributionStore(self.inputs.store))
        statistics = {
            (layer, kind): functools.reduce(
                lambda first, second: first.merge(second),
                [measure_shards(self.inputs, layer, kind, shards) for shards in groups],
            ).result()
            for layer in LAYERS
            for kind in kinds
        }
        write_statistics(directory, statistics)
        return directory


CONCEPTS = parse_concepts({"small": ["zero", 1, "one"], "absent": ["never"]}, NAMES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def modes(run):
    return run.summarize(run.path / "modes", concepts=CONCEPTS)


def read(directory, name, **wanted):
    rows = pq.read_table(directory / f"{name}.parquet").to_pylist()
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def same(found, expected):
    """Equal to rounding; None where nan is expected."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None or math.isnan(other)), (one, other)
        assert one is None or one == pytest.approx(float(other), abs=1e-12)


@pytest.mark.parametrize("unit", ["mode", "channel"])
def test_modes_file_equals_one_look_at_all_evaluate_rows(run, modes, unit):
    loadings = run.loadings(LAYER, QUANTITY) if unit == "mode" else run.rows[LAYER, QUANTITY].astype(float)
    evaluate = loadings[run.parts == "evaluate"]
    rows = read(modes, "modes", layer=LAYER, quantity=QUANTITY, unit=unit)
    assert [row["mode"] for row in rows] == list(range(loadings.shape[1]))
    on = evaluate != 0
    assert [row["alive"] for row in rows] == on.any(axis=0).tolist()
    same([row["frequency"] for row in rows], on.mean(axis=0))
    same([row["mean_loading"] for row in rows], [col[col != 0].mean() if col.any() else np.nan for col in evaluate.T])
    by_class = np.stack([run.correlation(loadings, "evaluate", [c]) for c in range(len(NAMES))])
    defined = ~np.isnan(by_class).all(axis=0)
    top = np.where(defined, np.nan_to_num(by_class, nan=-9).max(axis=0), np.nan)
    same([row["top_correlation"] for row in rows], top)
    for row, column in zip(rows, by_class.T, strict=True):
        assert row["top_class"] == (None if np.isnan(column).all() else int(np.nanargmax(column)))
        positive = np.nan_to_num(np.maximum(column[:3], 0))
        same([row["top1_mass"]], [positive.max() / positive.sum() if positive.sum() else np.nan])
    if unit == "mode":
        dictionary = SparseAutoencoder.load(run.path / "sae" / run.selected[LAYER][QUANTITY]).dictionary
        same([row["hoyer"] for row in rows], hoyer(dictionary).tolist())
        same([row["stability"] for row in rows], run.stability.tolist())
    else:
        assert {row["hoyer"] for row in rows} == {row["stability"] for row in rows} == {None}
        assert not rows[0]["alive"]


def test_best_mode_is_chosen_on_select_and_reported_on_evaluate(run, modes):
    loadings = run.loadings(LAYER, QUANTITY)
    rows = read(modes, "classes", layer=LAYER, quantity=QUANTITY, unit="mode")
    assert [row["class"] for row in rows] == [0, 1, 2, 3]
    for row in rows[:3]:
        select = run.correlation(loadings, "select", [row["class"]])
        evaluate = run.correlation(loadings, "evaluate", [row["class"]])
        assert row["best_mode"] == np.nanargmax(select)
        same([row["correlation_select"], row["correlation"]], [np.nanmax(select), evaluate[row["best_mode"]]])
        assert row["modes_above_threshold"] == (evaluate > THRESHOLD).sum()
    assert rows[3] | {"best_mode": None, "correlation_select": None, "correlation": None} == rows[3]


def test_concepts_are_unions_of_classes(run, modes):
    small, absent = read(modes, "concepts", layer=LAYER, quantity=QUANTITY, unit="mode")
    select = run.correlation(run.loadings(LAYER, QUANTITY), "select", [0, 1])
    evaluate = run.correlation(run.loadings(LAYER, QUANTITY), "evaluate", [0, 1])
    assert (small["concept"], small["best_mode"]) == ("small", np.nanargmax(select))
    same([small["correlation_select"], small["correlation"]], [np.nanmax(select), evaluate[small["best_mode"]]])
    assert (absent["concept"], absent["best_mode"], absent["modes_above_threshold"]) == ("absent", None, 0)


def test_layer_counts_follow_from_the_modes(modes):
    layers = read(modes, "layers")
    assert len(layers) == len(LAYERS) * 2 * 2
    for layer in layers:
        wanted = {key: layer[key] for key in ("layer", "quantity", "unit")}
        rows = read(modes, "modes", **wanted)
        tops = [row["top_correlation"] for row in rows if row["top_correlation"] is not None]
        assert layer["modes"] == len(rows)
        assert layer["alive"] == sum(row["alive"] for row in rows)
        assert layer["modes_above_threshold"] == sum(top > THRESHOLD for top in tops)
        assert layer["median_top_correlation"] == pytest.approx(np.median(tops))
        curve = read(modes, "coverage", axis="mode", **wanted)
        assert curve[0]["correlation"] == pytest.approx(np.mean(tops))
        assert [point["rank"] for point in curve] == [0, 1, 2]


def test_top_images_are_the_highest_loadings_of_evaluate(run, modes):
    loadings = run.loadings(LAYER, QUANTITY)
    found = read(modes, "top_images", layer=LAYER, quantity=QUANTITY)
    expected = []
    for mode in range(12):
        candidates = [(-loadings[row, mode], row) for row in np.flatnonzero(run.parts == "evaluate")]
        for rank, (loading, row) in enumerate(sorted(c for c in candidates if c[0] < 0)[:4]):
            label = None if run.labels[row] < 0 else run.labels[row]
            expected.append((mode, rank, run.shards[row], run.keys[row], label, -loading))
    assert [
        tuple(row[name] for name in ("mode", "rank", "shard", "key", "label", "loading")) for row in found
    ] == expected


def test_correlations_are_at_the_documented_place(run, modes):
    group = zarr.open_group(modes / "correlations.zarr", mode="r")
    for part in ("select", "evaluate"):
        array = group[f"blocks.1@input%3Aheads/{QUANTITY}/{part}"]
        expected = [run.correlation(run.loadings(LAYER, QUANTITY), part, [c]) for c in range(len(NAMES))]
        assert array.dtype == np.float64
        np.testing.assert_allclose(array[:], expected, rtol=0, atol=1e-12)


def test_statistics_are_of_the_evaluate_rows(run, modes):
    rows = read(modes, "statistics")
    assert [(row["layer"], row["quantity"]) for row in rows] == [
        (layer, kind) for layer in LAYERS for kind in ("contribution", "activation")
    ]
    evaluate = run.parts == "evaluate"
    for row in rows:
        positive, negative = (run.rows[row["layer"], f"{row['quantity']}-{s}"] for s in ("positive", "negative"))
        net = positive.astype(float) + negative
        assert row["samples"] == evaluate.sum()
        assert row["hoyer_mean"] == pytest.approx(hoyer(torch.from_numpy(net[evaluate])).mean().item(), abs=1e-12)
        balance = [-np.corrcoef(p, n)[0, 1] for p, n in zip(positive[evaluate], negative[evaluate], strict=True)]
        assert row["ei_mean"] == pytest.approx(np.mean(balance), abs=1e-6)
        group = zarr.open_group(modes / "statistics.zarr", mode="r")
        group = group[f"{row['layer'].replace(':', '%3A')}/{row['quantity']}"]
        np.testing.assert_allclose(group["channel_maximum"][:], net[evaluate].max(axis=0))
        of_class = net[evaluate & (run.labels == 1)].mean(axis=0)
        np.testing.assert_allclose(group["class_means"][1], of_class, rtol=1e-12)
        assert group["hoyer_histogram"][:].sum() == evaluate.sum()
        assert row["components_95"] == int((group["cumulative_variance"][:] < 0.95).sum()) + 1


def test_any_grouping_of_shards_gives_the_same_files(run, modes, tmp_path):
    other = run.summarize(tmp_path / "other", groups=((1,), (0, 2)), concepts=CONCEPTS)
    for path in modes.glob("*.parquet"):
        first, second = pq.read_table(path).to_pylist(), pq.read_table(other / path.name).to_pylist()
        for one, two in zip(first, second, strict=True):
            assert one == pytest.approx(two, abs=1e-12)


def test_a_notebook_reads_what_was_written(run, modes):
    summary = ModeSummary.load(modes)
    assert summary.layers == list(LAYERS)
    entry = summary.modes(LAYER, QUANTITY)
    best = read(modes, "classes", layer=LAYER, quantity=QUANTITY, unit="mode")[1]
    top = entry.top_modes("one", 3)
    assert (top[0].mode, top[0].correlation) == (best["best_mode"], best["correlation"])
    assert top == entry.top_modes(1)[:3]
    assert [mode.correlation_select for mode in top] == sorted([m.correlation_select for m in top], reverse=True)
    row = read(modes, "modes", layer=LAYER, quantity=QUANTITY, unit="mode")[top[0].mode]
    classes = entry.top_classes(top[0].mode)
    assert (classes[0].index, classes[0].correlation) == (row["top_class"], row["top_correlation"])
    assert classes[0].name == NAMES[row["top_class"]]
    assert [image["rank"] for image in entry.images(top[0].mode)] == list(range(len(entry.images(top[0].mode))))
    concept = read(modes, "concepts", layer=LAYER, quantity=QUANTITY, unit="mode")[0]
    assert entry.top_modes_of_concept("small")[0].mode == concept["best_mode"]
    later = entry.concept_correlations({"again": [0, 1]})[1]
    np.testing.assert_allclose(later[0], run.correlation(run.loadings(LAYER, QUANTITY), "evaluate", [0, 1]), atol=1e-12)
    assert summary.channels(LAYER, QUANTITY).images(0) == []
    assert len(summary.tables["layers"]) == len(summary) == 8


def test_saving_what_was_loaded_changes_nothing(modes, tmp_path):
    ModeSummary.load(modes).save(tmp_path / "copy")
    for path in (tmp_path / "copy").glob("*.parquet"):
        assert pq.read_table(path).equals(pq.read_table(modes / path.name))
    first, second = ModeSummary.load(modes), ModeSummary(ModeSummary.load(tmp_path / "copy"))
    for one, two in zip(first, second, strict=True):
        for part in ("select", "evaluate"):
            for name, value in vars(getattr(one, part)).items():
                other = getattr(getattr(two, part), name)
                torch.testing.assert_close(
                    torch.as_tensor(value), torch.as_tensor(other), equal_nan=True, rtol=0, atol=0
                )
    assert second.tables["modes"].equals(first.tables["modes"])


def test_data_without_labels_are_summarized_without_classes(tmp_path):
    run = Run(tmp_path, labelled=False)
    directory = run.summarize(tmp_path / "modes")
    assert read(directory, "classes") == []
    rows = read(directory, "modes", layer=LAYER, quantity=QUANTITY, unit="mode")
    assert any(row["alive"] for row in rows)
    assert {row["top_class"] for row in rows} == {None}
    assert {row["components_95"] for row in read(directory, "statistics")} == {None}
    assert ModeSummary.load(directory).modes(LAYER, QUANTITY).correlation.shape == (0, 12)


def test_empty_evaluate_part_gives_nulls(run, tmp_path):
    split = pq.read_table(run.inputs.split)
    split = split.set_column(3, "part", pa.array(["fit"] * len(split)))
    pq.write_table(split, tmp_path / "split.parquet")
    inputs = FoldInputs(run.inputs.store, tmp_path / "split.parquet", len(NAMES))
    task = summary_tasks(run.path / "sae", run.selected)[0]
    entries = list(finish_summary(inputs, task, summarize_shards(inputs, task), NAMES, THRESHOLD))
    ModeSummary(entries).save(tmp_path / "modes")
    assert {row["alive"] for row in read(tmp_path / "modes", "modes")} == {False}
    assert {row["best_mode"] for row in read(tmp_path / "modes", "classes")} == {None}
    assert read(tmp_path / "modes", "top_images") == []
    assert measure_shards(inputs, LAYER, "contribution").result().numbers()["hoyer_mean"] is None


def test_a_failed_summary_leaves_the_one_before(run, modes, tmp_path):
    ModeSummary.load(modes).save(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    entry = ModeSummary.load(modes).modes(LAYER, QUANTITY)

    def fail_half_way():
        with SummaryWriter(tmp_path) as writer:
            writer.add(entry)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    assert len(ModeSummary.load(tmp_path).modes(LAYER, QUANTITY)) == 12
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []


def test_a_new_split_is_read_again_in_the_same_process(run, tmp_path):
    target = tmp_path / "split.parquet"
    split = pq.read_table(run.inputs.split)
    inputs = FoldInputs(run.inputs.store, target, len(NAMES))
    counts = []
    for part in ("evaluate", "fit"):
        pq.write_table(split.set_column(3, "part", pa.array([part] * len(split))), target)
        counts.append(measure_shards(inputs, LAYER, "contribution").result().samples)
    assert counts == [74, 0]


def test_what_does_not_fit_together_is_one_clear_line(run, tmp_path):
    store = ContributionStore(run.inputs.store)
    split = pq.read_table(run.inputs.split)
    with pytest.raises(ModesError, match=r"2 of 74 stored samples .* are in no part of the split"):
        assign_parts(store.samples, split.slice(2))
    with pytest.raises(ModesError, match="1 samples more than once"):
        assign_parts(store.samples, pa.concat_tables([split, split.slice(0, 1)]))
    other = run.path / "sae" / run.selected["blocks.0"][QUANTITY]
    with pytest.raises(ModesError, match=r"decomposes 6 channels, blocks\.1@input:heads has 9"):
        summarize_shards(run.inputs, SummaryTask(LAYER, QUANTITY, other))
    with pytest.raises(ModesError, match="label 2 found where there are 2 classes"):
        summarize_shards(FoldInputs(run.inputs.store, run.inputs.split, 2), SummaryTask(LAYER, QUANTITY))
    with pytest.raises(ModesError, match="run the stages"):
        summarize_shards(FoldInputs(tmp_path, run.inputs.split, 2), SummaryTask(LAYER, QUANTITY))
    with pytest.raises(ModesError, match="run the stage `summarize` first"):
        ModeSummary.load(tmp_path)


def test_unknown_names_are_answered_with_the_nearest(modes):
    summary = ModeSummary.load(modes)
    entry = summary.modes(LAYER, QUANTITY)
    with pytest.raises(ModesError, match=r"did you mean blocks\.1@input:heads contribution-positive"):
        summary.modes("blocks.1@input:head", QUANTITY)
    with pytest.raises(ModesError, match="unknown class 'on'.*one"):  # noqa: RUF043
        entry.top_modes("on")
    with pytest.raises(ModesError, match="no class 4"):
        entry.top_modes(4)
    with pytest.raises(ModesError, match="has no mode 12"):
        entry.images(12)
    with pytest.raises(ModesError, match="unknown concept 'smal'"):
        entry.top_modes_of_concept("smal")


def test_stability_is_kept_with_the_modes_of_an_sae_that_has_other_seeds(run, modes):
    summary = ModeSummary.load(modes)
    found = summary.modes(LAYER, QUANTITY).stability
    torch.testing.assert_close(found, run.stability, rtol=0, atol=1e-6, equal_nan=True)
    assert summary.modes(LAYER, "activation-positive").stability is None
    assert summary.channels(LAYER, QUANTITY).stability is None
