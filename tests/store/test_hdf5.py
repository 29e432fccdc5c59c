"""What import and export promise: the same numbers, in the authors' layout and in a store."""

import sys

import numpy as np
import pytest

from codec_dist.store import ContributionStore, Ledger, StoreError, export_hdf5, finish_store, import_hdf5
from codec_dist.store.writing import BlockWriter

h5py = pytest.importorskip("h5py")

ROWS = 23


def numbers(layer, kind, sign, signed=True):
    random = np.random.default_rng([layer, len(kind), len(sign)])
    values = np.maximum(random.standard_normal((ROWS, 4 + layer)), 0).astype(np.float32)
    return -values if sign == "negative" and signed else values


@pytest.fixture
def make_file(tmp_path):
    """A file as the authors' scripts leave it."""

    def make(name="theirs.h5", signed=True, labels=True, kinds=("contributions", "activations"), layers=11):
        with h5py.File(tmp_path / name, "w") as data:
            for layer in range(layers):
                for kind in kinds:
                    for sign in ("positive", "negative"):
                        data[f"{layer}/{kind}/{sign}"] = numbers(layer, kind, sign, signed)
            if labels:
                data["targets"] = np.arange(ROWS) % 5 - 1
        return tmp_path / name

    return make


@pytest.mark.parametrize("signed", [True, False])
def test_their_file_becomes_a_store_with_the_same_numbers(make_file, tmp_path, signed):
    import_hdf5(make_file(signed=signed), tmp_path / "store", rows_per_shard=10, target="top_1")
    store = ContributionStore(tmp_path / "store")
    assert store.complete
    assert store.shards == (("rows-000000", 10), ("rows-000001", 10), ("rows-000002", 3))
    assert list(store.layers.items()) == [(str(layer), 4 + layer) for layer in range(11)], "by number, not by name"
    assert store.targets == ("top_1",)
    for layer in range(11):
        for kind in ("contribution", "activation"):
            for sign in ("positive", "negative"):
                expected = numbers(layer, f"{kind}s", sign)
                found = store.read(str(layer), f"{kind}-{sign}")
                assert found.dtype == np.float32
                np.testing.assert_array_equal(found, expected)
    samples = store.samples
    assert samples["key"].to_pylist() == [str(row) for row in range(ROWS)]
    assert samples["label"].to_pylist() == [row % 5 - 1 if row % 5 else None for row in range(ROWS)]
    assert samples["prediction"].null_count == samples["target_value"].null_count == ROWS


def test_layers_may_be_named_and_labels_may_be_absent(make_file, tmp_path):
    path = make_file(labels=False, layers=2, kinds=("gradients",))
    import_hdf5(path, tmp_path / "store", layers=["layer1.0", "layer1.1"])
    store = ContributionStore(tmp_path / "store")
    assert list(store.layers) == ["layer1.0", "layer1.1"]
    assert store.quantities == ("gradient-positive", "gradient-negative")
    assert store.samples["label"].null_count == ROWS


def test_an_import_that_was_stopped_goes_on_to_the_same_digest(make_file, tmp_path, monkeypatch):
    path = make_file(layers=2)
    import_hdf5(path, tmp_path / "whole", rows_per_shard=5)
    write = BlockWriter.write

    def stop_at_third(self, number, *arguments):
        if number == 2:
            raise KeyboardInterrupt
        return write(self, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "write", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            import_hdf5(path, tmp_path / "store", rows_per_shard=5)
    assert Ledger(tmp_path / "store").pending() == [2, 3, 4]
    import_hdf5(path, tmp_path / "store", rows_per_shard=5)
    assert ContributionStore(tmp_path / "store").digest() == ContributionStore(tmp_path / "whole").digest()
    with pytest.raises(StoreError, match=r"imported\.sha256: .* in the store, .* requested"):
        import_hdf5(make_file("other.h5", labels=False, layers=2), tmp_path / "store", rows_per_shard=5)


def test_a_store_becomes_their_file_and_a_store_again(tmp_path, make_plan):
    plan = make_plan(
        tmp_path / "store",
        targets=("top_1", "top_5"),
        quantities=("contribution-positive", "contribution-negative", "activation-positive"),
        dropped={1: 2},
    )
    plan.create()
    for number in range(3):
        plan.write(number)
    finish_store(plan.path)
    store = ContributionStore(plan.path)
    for target, prefix in {None: "contribution", "top_5": "contribution[top_5]"}.items():
        path = tmp_path / f"{target}.h5"
        export_hdf5(plan.path, path, target=target)
        with h5py.File(path) as data:
            assert sorted(data) == ["0", "1", "targets"]
            assert [data[name].attrs["name"] for name in "01"] == list(plan.layers)
            assert data["targets"][:].tolist() == store.samples["label"].fill_null(-1).to_pylist()
            for number, layer in enumerate(plan.layers):
                for sign in ("positive", "negative"):
                    values = data[f"{number}/contributions/{sign}"][:]
                    np.testing.assert_array_equal(values, plan.expected(layer, f"{prefix}-{sign}"))
                activations = data[f"{number}/activations/positive"][:]
                np.testing.assert_array_equal(activations, plan.expected(layer, "activation-positive"))
                assert "negative" not in data[f"{number}/activations"]
    import_hdf5(tmp_path / "None.h5", tmp_path / "again", layers=list(plan.layers), target="top_1")
    again = ContributionStore(tmp_path / "again")
    for layer in plan.layers:
        for name in plan.quantities:
            np.testing.assert_array_equal(again.read(layer, name), store.read(layer, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: [data.__delitem__(str(layer)) for layer in range(11)], "no groups named by layer indices"),
        (lambda data: data.__delitem__("3/activations/negative"), "must hold the same quantities"),
        (
            lambda data: data.__delitem__("targets") or data.update({"targets": np.zeros(4)}),
            "expected 23 whole numbers",
        ),
        (lambda data: data.__delitem__("targets") or data.update({"targets": np.full(23, 0.5)}), "whole numbers"),
        (
            lambda data: (
                data.__delitem__("3/activations/negative") or data.update({"3/activations/negative": np.zeros((4, 7))})
            ),
            r"3/activations/negative has shape \[4, 7\]: expected \[rows, channels\], here \[23, 7\]",
        ),
        (
            lambda data: data["3/activations/positive"].__setitem__((5, 2), np.nan),
            r"activation-positive of layer '3' in channel 2 of sample '5' is nan",
        ),
        (
            lambda data: data["3/activations/positive"].__setitem__((5, 2), -1),
            r"is -1 in channel 2 of sample '5': the positive part must be",
        ),
    ],
)
def test_files_of_another_layout_are_refused(make_file, tmp_path, change, message):
    path = make_file()
    with h5py.File(path, "r+") as data:
        change(data)
    with pytest.raises(StoreError, match=message) as refused:
        import_hdf5(path, tmp_path / "store")
    assert "\n" not in str(refused.value)


def test_what_cannot_be_read_or_written_is_one_clear_line(make_file, tmp_path, full):
    with pytest.raises(StoreError, match=r"nowhere.h5: there is no such file"):
        import_hdf5(tmp_path / "nowhere.h5", tmp_path / "none")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(StoreError, match=r"cannot read .*text.h5: "):
        import_hdf5(tmp_path / "text.h5", tmp_path / "none")
    with pytest.raises(StoreError, match="has 11 layers: 2 names were given"):
        import_hdf5(make_file(), tmp_path / "none", layers=["a", "b"])
    with pytest.raises(StoreError, match=r"theirs.h5: there is such a file"):
        export_hdf5(full.path, make_file())
    with pytest.raises(StoreError, match="has no target 'top_9': it has top_1"):
        export_hdf5(full.path, tmp_path / "new.h5", target="top_9")
    (full.path / "ledger" / "000001.json").unlink()
    with pytest.raises(StoreError, match="is not complete"):
        export_hdf5(full.path, tmp_path / "new.h5")
    assert not (tmp_path / "new.h5").exists()
    assert not (tmp_path / "none").exists()


def test_without_h5py_the_remedy_is_named(make_file, tmp_path, full, monkeypatch):
    path = make_file()
    monkeypatch.setitem(sys.modules, "h5py", None)
    for call in (lambda: import_hdf5(path, tmp_path / "store"), lambda: export_hdf5(full.path, tmp_path / "new.h5")):
        with pytest.raises(StoreError, match=r"need the package h5py: pip install 'codec_dist\[hdf5\]'"):
            call()
