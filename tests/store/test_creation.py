"""What making a store promises: one identity per store, spelled-out refusals, sensible chunks."""

import json
import os
from pathlib import Path

import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from codec_dist.store import ContributionStore, Ledger, StoreError
from codec_dist.store.layout import Layout
from codec_dist.store.place import LocalPlace


def test_the_layout_is_what_the_documentation_says(full):
    group = zarr.open_group(full.path / "arrays.zarr", mode="r")
    assert group.metadata.zarr_format == 3
    attributes = group.attrs.asdict()
    assert attributes["format"] == {"name": "codec_dist contribution store", "version": 2}
    assert attributes["identity"] == full.identity
    assert attributes["layers"] == [["blocks.0", 3], ["blocks.1@input:heads", 5]]
    array = group["layers/blocks.1@input%3Aheads/contribution/top_1/positive"]
    assert array.shape == (18, 5)
    assert array.chunks == (6, 5)
    assert array.attrs["quantity"] == "contribution[top_1]-positive"
    assert group["layers/blocks.0/activation/positive"].shape == (18, 3)
    assert sorted(os.listdir(full.path)) == ["arrays.zarr", "ledger", "samples"]
    assert sorted(os.listdir(full.path / "ledger")) == ["000000.json", "000001.json", "000002.json"]
    assert sorted(os.listdir(full.path / "samples")) == ["000000.parquet", "000001.parquet", "000002.parquet"]


def test_layers_keep_their_order(tmp_path, make_plan):
    layers = {"z": 1, "a": 2, "m.10": 3, "m.9": 4}
    plan = make_plan(tmp_path / "store", layers=layers)
    plan.create()
    assert list(ContributionStore(plan.path).layers.items()) == list(layers.items())


def test_making_it_again_changes_nothing(full):
    digest = ContributionStore(full.path).digest()
    full.create()
    full.create(settings={"microbatch": 7})
    store = ContributionStore(full.path)
    assert store.digest() == digest
    assert store.settings == {}, "an existing store keeps its own settings"


def test_another_identity_is_refused_with_the_differences_spelled_out(plan):
    identity = {"model": "m", "attribution": {"method": {"name": "ig", "options": {"steps": 10, "baseline": "zeros"}}}}
    other = {"model": "n", "attribution": {"method": {"name": "ig", "options": {"steps": 20}}}, "extra": [1]}
    path = plan.path.parent / "other"
    plan.path = path
    plan.create(identity=identity)
    with pytest.raises(StoreError) as caught:
        plan.create(identity=other)
    assert str(caught.value) == (
        f"the store {path} was made with other settings: model: m in the store, n requested; "
        "attribution.method.options.steps: 10 in the store, 20 requested; "
        "attribution.method.options.baseline: zeros in the store, nothing requested; "
        "extra: nothing in the store, [1] requested. "
        "Choose another place (store.location, or run.directory), or give the settings of the store"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layers": {"blocks.0": 3, "blocks.1@input:heads": 6}},
            "layers.blocks.1@input:heads: 5 in the store, 6 requested",
        ),
        ({"layers": {"blocks.0": 3}}, "layers.blocks.1@input:heads: 5 in the store, nothing requested"),
        ({"targets": ["top_2"]}, r'targets: \["top_1"\] in the store, \["top_2"\] requested'),
        ({"quantities": ["activation-positive"]}, "quantities: .* in the store, .* requested"),
        ({"dtype": "float64"}, "dtype: float32 in the store, float64 requested"),
        ({"shards": [("s-0.tar", 4)]}, "shards: 3 in the store, 1 requested; samples: 11 in the store, 4 requested"),
        ({"shards": [("s-1.tar", 4), ("s-0.tar", 6), ("s-2.tar", 1)]}, "names and sizes of shards: .* requested"),
        ({"identity": {"model": "m", "method": {"steps": 10.5}}}, r"method.steps: 10 in the store, 10.5 requested"),
        ({"identity": {"model": "m", "method": {"steps": True}}}, "method.steps: 10 in the store, true requested"),
    ],
)
def test_every_part_of_the_form_belongs_to_the_identity(plan, change, message):
    with pytest.raises(StoreError, match=message) as caught:
        plan.create(**change)
    assert "\n" not in str(caught.value)


def test_order_of_identity_keys_and_tuples_do_not_matter(plan):
    plan.create(identity={"method": {"steps": 10}, "model": "m"})
    path = plan.path.parent / "tuples"
    plan.path = path
    plan.create(identity={"a": (1, 2)})
    plan.create(identity={"a": [1, 2]})


def test_settings_that_were_measured_are_kept(plan, tmp_path):
    plan.path = tmp_path / "measured"
    plan.create(settings={"steps": 12, "microbatch": 64})
    assert ContributionStore(plan.path).settings == {"steps": 12, "microbatch": 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": {}}, "needs layers"),
        ({"layers": {"a": 0}}, "at least one channel"),
        ({"dtype": "bfloat16"}, "'bfloat16': choose one of float16, float32, float64"),
        ({"shards": []}, "needs shards"),
        ({"shards": [("a", 1), ("a", 2)]}, "different names"),
        ({"shards": [("a", -1)]}, "needs shards"),
        ({"quantities": ["contribution-net"]}, "unknown quantity 'contribution-net': did you mean contribution-"),
        ({"quantities": []}, "must be given"),
        ({"quantities": ["activation-positive"] * 2}, "each once"),
        ({"targets": []}, "needs a target"),
        ({"targets": ["a", "a"]}, "each once"),
    ],
)
def test_arguments_that_describe_no_store_are_refused(tmp_path, make_plan, change, message):
    with pytest.raises(StoreError, match=message):
        make_plan(tmp_path / "store").create(**change)
    assert not (tmp_path / "store").exists()


def test_a_folder_that_is_no_store_is_refused_by_everyone(tmp_path):
    for opened in (ContributionStore, Ledger):
        with pytest.raises(StoreError, match="is not a contribution store: there is no such folder"):
            opened(tmp_path / "nowhere")
        with pytest.raises(StoreError, match=r"is not a contribution store: it has no readable arrays\.zarr"):
            opened(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is not a contribution store"):
        ContributionStore(tmp_path / "file")


def test_another_zarr_group_and_a_newer_format_are_refused(full, tmp_path, make_plan):
    zarr.create_group(tmp_path / "foreign" / "arrays.zarr", zarr_format=3)
    with pytest.raises(StoreError, match="holds something else"):
        make_plan(tmp_path / "foreign").create()
    metadata = full.path / "arrays.zarr" / "zarr.json"
    content = json.loads(metadata.read_text())
    content["attributes"]["format"]["version"] = 3
    metadata.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="format version 3, this version reads 2"):
        ContributionStore(full.path)
    metadata.write_text("{")
    with pytest.raises(StoreError, match="is not a contribution store"):
        ContributionStore(full.path)


def test_a_ledger_without_arrays_is_not_taken_for_done_work(full):
    (full.path / "arrays.zarr").rename(full.path / "elsewhere")
    with pytest.raises(StoreError, match=r"has a ledger but no arrays\.zarr"):
        full.create()


def test_a_store_that_was_killed_while_it_was_made_is_made_again(tmp_path, make_plan):
    plan = make_plan(tmp_path / "store")
    (plan.path / ".arrays.zarr.abc.partial" / "arrays.zarr").mkdir(parents=True)
    (plan.path / ".arrays.zarr.abc.partial" / "arrays.zarr" / "zarr.json").write_text("{")
    plan.create()
    plan.write(0)
    assert Ledger(plan.path).pending() == [1, 2]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, make_plan):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="it is a file"):
        make_plan(tmp_path / "file").create()


@given(
    samples=st.lists(st.integers(0, 100_000), min_size=1, max_size=5),
    channels=st.lists(st.integers(1, 100_000), min_size=1, max_size=4),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
)
def test_blocks_hold_the_largest_shard_in_even_chunks_of_at_most_16_mib(samples, channels, dtype):
    place = LocalPlace(Path("x"))
    layout = Layout(
        place, {}, {str(number): count for number, count in enumerate(channels)}, ("t",), ("activation-positive",),
        tuple((str(number), count) for number, count in enumerate(samples)), dtype, {},
    )  # fmt: skip
    row_bytes = max(channels) * {"float16": 2, "float32": 4, "float64": 8}[dtype]
    assert layout.block_rows >= max(samples)
    assert layout.block_rows % layout.chunk_rows == 0
    assert layout.chunk_rows * row_bytes <= 16 * 1024 * 1024
    chunks = layout.block_rows // layout.chunk_rows
    assert layout.block_rows - max(1, *samples) < chunks, "no more padding than rounding asks"
    if max(1, *samples) * row_bytes <= 16 * 1024 * 1024:
        assert chunks == 1
