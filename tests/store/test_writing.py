"""What writing promises: all or pending, the same bytes again, and problems named by layer, channel and sample."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from codec_dist.store import BlockWriter, ContributionStore, Ledger, StoreError, finish_store


def files_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_markers_say_what_was_written(plan):
    plan.dropped = {1: 2}
    marker = plan.write(1, seconds=2.5, attempt=3)
    assert (marker.shard_number, marker.shard, marker.rows, marker.seconds, marker.attempt) == (1, "s-1.tar", 4, 2.5, 3)
    assert marker.dropped == (("key-1-4", "no image"), ("key-1-5", "no image"))
    assert marker.identity == ContributionStore(plan.path).identity_hash
    assert {layer: set(found) for layer, found in marker.checksums.items()} == {
        layer: set(plan.quantities) for layer in plan.layers
    }
    assert Ledger(plan.path).done() == {1: marker}
    assert Ledger(plan.path).pending() == [0, 2]


def test_writing_again_gives_the_same_bytes(full):
    before = files_below(full.path)
    full.write(1)
    full.write(0)
    assert files_below(full.path) == before


def test_writers_of_different_shards_share_no_file(plan):
    written = []
    for number in range(3):
        before = files_below(plan.path)
        plan.write(number)
        after = files_below(plan.path)
        assert all(after[path] == content for path, content in before.items())
        written.append(set(after) - set(before))
    arrays = len(plan.layers) * len(plan.quantities)
    assert [len(files) for files in written] == [arrays + 2] * 3


def test_zeros_are_written_as_files_too(plan):
    zeros = {name: np.zeros_like(values) for name, values in plan.values(2).items()}
    plan.write(2, values=zeros)
    chunk = plan.path / "arrays.zarr/layers/blocks.0/contribution/top_1/positive/c.2.0"
    assert chunk.stat().st_size == 6 * 3 * 4


def test_threads_may_share_a_writer(tmp_path, make_plan):
    plan = make_plan(tmp_path / "store", shards=[(f"s-{number}.tar", 3) for number in range(12)])
    plan.create()
    writer = BlockWriter(plan.path)

    def write(number):
        zeros = {name: np.zeros_like(values) for name, values in plan.values(number).items()}
        writer.write(number, zeros, plan.samples(number))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(12)))
    assert Ledger(plan.path).pending() == []
    chunks = list((plan.path / "arrays.zarr").rglob("c.*.0"))
    assert len(chunks) == 12 * len(plan.layers) * len(plan.quantities)


def test_a_failure_before_the_marker_leaves_the_shard_pending(plan):
    (plan.path / "ledger" / "000001.json").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"cannot write shard s-1.tar into"):
        plan.write(1)
    assert (plan.path / "samples" / "000001.parquet").exists()
    assert Ledger(plan.path).pending() == [0, 1, 2]
    (plan.path / "ledger" / "000001.json").rmdir()
    plan.write(1)
    assert Ledger(plan.path).pending() == [0, 2]


def test_a_full_disk_is_a_clear_error(plan):
    code = (
        "import resource, sys, numpy, pyarrow\n"
        "from codec_dist.store import BlockWriter, StoreError, create_store\n"
        "create_store(sys.argv[1], identity={}, layers={'wide': 4096}, targets=[], quantities=['activation-positive'],"
        " shards=[('s', 64)])\n"
        "writer = BlockWriter(sys.argv[1])\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "table = pyarrow.table({'key': [str(n) for n in range(64)], 'label': [0] * 64, 'prediction': [0] * 64,"
        " 'target_value': [0.0] * 64, 'baseline_value': [0.0] * 64})\n"
        "try: writer.write(0, {('wide', 'activation-positive'): numpy.ones((64, 4096), 'f4')}, table)\n"
        "except StoreError as error: print(error)\n"
    )
    path = plan.path.parent / "small"
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert found.stdout == f"cannot write shard s into {path}: File too large; free space or repair the disk\n"
    assert Ledger(path).pending() == [0]


def test_a_killed_writer_leaves_a_store_that_completes_to_the_same_digest(tmp_path, make_plan):
    shards = [(f"s-{number}.tar", 5) for number in range(400)]
    code = Path(__file__).parent.joinpath("conftest.py").read_text() + (
        "\nimport sys\nplan = Plan(Path(sys.argv[1]), shards=[(f's-{n}.tar', 5) for n in range(400)])\nplan.create()\n"
        "for number in range(400):\n    plan.write(number)\n    print(number, flush=True)\n"
    )
    plan = make_plan(tmp_path / "killed", shards=shards)
    with subprocess.Popen([sys.executable, "-c", code, str(plan.path)], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    done = Ledger(plan.path).done()
    assert 3 <= len(done) < 400
    part = ContributionStore(plan.path)
    assert not part.complete
    np.testing.assert_array_equal(
        part.read("blocks.0", "activation-positive"), plan.expected("blocks.0", "activation-positive", sorted(done))
    )
    # The rest of a shorter store stands for the rest of this one: all shards that were begun, and one more.
    last = max(done) + 2
    for number in Ledger(plan.path).pending():
        if number <= last:
            plan.write(number)
    other = make_plan(tmp_path / "whole", shards=shards)
    other.create()
    for number in range(last + 1):
        other.write(number)
    assert ContributionStore(plan.path).digest() == ContributionStore(other.path).digest()


def test_leftovers_of_a_crash_and_foreign_files_are_passed_over(full):
    ledger = full.path / "ledger"
    content = (ledger / "000001.json").read_text()
    (ledger / "000001.json").rename(ledger / ".000001.json.x7.partial")
    (ledger / "notes.txt").write_text("mine")
    (ledger / "000099.json").write_text(content)
    (full.path / "samples" / ".000001.parquet.q.partial").write_bytes(b"half")
    (full.path / "arrays.zarr/layers/blocks.0/activation/positive/c.1.0.123.partial").write_bytes(b"half")
    (full.path / ".samples.parquet.partial").write_bytes(b"half")
    assert Ledger(full.path).pending() == [1]
    assert ContributionStore(full.path).shard_numbers == [0, 2]
    full.write(1)
    finish_store(full.path)
    assert ContributionStore(full.path).complete


@pytest.mark.parametrize("damage", ["{", '"text"', "{}", "foreign", "misplaced"])
def test_a_marker_that_is_not_this_stores_marks_nothing(full, damage):
    path = full.path / "ledger" / "000001.json"
    values = json.loads(path.read_text())
    changed = {"foreign": values | {"identity": "0" * 64}, "misplaced": values | {"shard_number": 2}}.get(damage)
    path.write_text(json.dumps(changed) if changed else damage)
    assert Ledger(full.path).pending() == [1]
    full.write(1)
    assert Ledger(full.path).pending() == []


def with_value(plan, number, name, where, value):
    values = plan.values(number)
    values[name][where] = value
    return values


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"contribution-positive of layer 'blocks.1@input:heads' in channel 4 of sample 'key-1-3' is nan"),
        (np.inf, r"in channel 4 of sample 'key-1-3' is inf"),
        (-0.5, r"is -0.5 in channel 4 of sample 'key-1-3': the positive part must be ≥ 0"),
    ],
)
def test_bad_values_are_named_by_layer_channel_and_sample(plan, value, message):
    values = with_value(plan, 1, ("blocks.1@input:heads", "contribution-positive"), (3, 4), value)
    before = files_below(plan.path)
    with pytest.raises(StoreError, match=message) as caught:
        plan.write(1, values=values)
    assert "\n" not in str(caught.value)
    assert files_below(plan.path) == before, "nothing is written before all is checked"


def test_a_negative_part_that_is_not_negative_is_refused(plan):
    values = with_value(plan, 1, ("blocks.0", "contribution-negative"), (0, 2), 1e-3)
    with pytest.raises(StoreError, match=r"in channel 2 of sample 'key-1-0': the negative part must be ≤ 0"):
        plan.write(1, values=values)


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65520.0), ("float32", 1e39)])
def test_overflow_of_the_stored_type_is_named(tmp_path, make_plan, dtype, value):
    plan = make_plan(tmp_path / "store", dtype=dtype)
    plan.create()
    values = {name: array.astype(np.float64) for name, array in plan.values(0).items()}
    values["blocks.0", "activation-positive"][2, 1] = value
    with pytest.raises(
        StoreError, match=rf"channel 1 of sample 'key-0-2' is {value:g}.*overflows {dtype}".replace("+", r"\+")
    ):
        plan.write(0, values=values)


def test_values_are_stored_in_the_stores_type(tmp_path, make_plan):
    plan = make_plan(tmp_path / "store", dtype="float16")
    plan.create()
    wide = {name: array.astype(np.float64) for name, array in plan.values(0).items()}
    plan.write(0, values=wide)
    found = ContributionStore(plan.path).read("blocks.0", "activation-positive")
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, wide["blocks.0", "activation-positive"].astype(np.float16))


ACTIVATION = ("blocks.0", "activation-positive")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (ACTIVATION, None, "1 of 6 arrays are missing, first activation-positive of layer 'blocks.0'"),
        (("blocks.7", "activation-positive"), 0, r"no layer 'blocks\.7': did you mean blocks\.0"),
        (("blocks.0", "activation-negative"), 0, "no quantity 'activation-negative': did you mean "),
        (ACTIVATION, np.ones((6, 4), "f4"), r"has shape \[6, 4\], expected \[6, 3\] \(6 samples, 3 channels\)"),
        (ACTIVATION, np.ones((5, 3), "f4"), r"has shape \[5, 3\], expected \[6, 3\]"),
        (ACTIVATION, np.ones((6, 3), int), "has type int64: expected floating-point"),
    ],
)
def test_arrays_that_are_not_the_stores_are_refused(plan, name, array, message):
    values = plan.values(1) | {name: array}
    if array is None:
        del values[name]
    with pytest.raises(StoreError, match=message):
        plan.write(1, values=values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(["prediction"]), "have no column 'prediction'"),
        (lambda t: t.slice(1), "has 6 samples: 5 rows and 0 dropped samples were given"),
        (lambda t: t.append_column("row", pa.array(range(6))), "have a column 'row': the store adds it"),
        (lambda t: t.set_column(0, "key", pa.array(list("aabcde"))), "need keys, each once: 'a'"),
        (lambda t: t.set_column(0, "key", pa.array([None, *"abcde"])), "need keys, each once: None"),
        (lambda t: t.set_column(1, "label", pa.array([0, 1, -1, 0, 1, 2])), "has the label -1: give null"),
        (lambda t: t.set_column(1, "label", pa.array(list("abcdef"))), "column 'label' of shard s-1.tar's samples"),
    ],
)
def test_samples_that_do_not_fit_are_refused(plan, change, message):
    with pytest.raises(StoreError, match=message):
        plan.write(1, samples=change(plan.samples(1)))


def test_a_dropped_sample_has_no_row_as_well(plan):
    with pytest.raises(StoreError, match="need keys, each once: 'key-1-0'"):
        plan.write(1, samples=plan.samples(1).slice(0, 5), dropped=[("key-1-0", "bad")])


def test_shards_that_do_not_exist_are_refused(plan):
    with pytest.raises(StoreError, match=r"no shard 3 .* it has 3"):
        BlockWriter(plan.path).write(3, {}, plan.samples(1))


def test_finishing_needs_every_shard(plan):
    plan.write(1)
    with pytest.raises(StoreError, match=r"2 of 3 shards are pending, first s-0.tar; run `codec-dist extract` again"):
        finish_store(plan.path)
    assert not (plan.path / "samples.parquet").exists()


def test_finishing_refuses_tables_that_do_not_fit_together(full):
    full.write(1, samples=full.samples(1).drop(["completeness.blocks.0"]))
    with pytest.raises(StoreError, match=r"000001.parquet has other columns"):
        finish_store(full.path)
