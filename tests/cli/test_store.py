"""The `store` commands: what they print, and what their exit code says."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from codec_dist.cli import main
from codec_dist.store import BlockWriter, ContributionStore, Lease, Ledger, create_store, finish_store


def write(path: Path, number: int) -> None:
    values = np.random.default_rng(number).random((5, 4), np.float32)
    samples = pa.table(
        {
            "key": [f"key-{number}-{position}" for position in range(5)],
            "label": pa.array([0, 1, 2, None, 1], pa.int32()),
            "prediction": [0, 1, 2, 0, 1],
            "target_value": np.arange(5.0),
            "baseline_value": np.zeros(5),
        }
    )
    BlockWriter(path).write(number, {("blocks.0", "contribution-positive"): values}, samples)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "store"
    shards = [("s-0.tar", 5), ("s-1.tar", 5)]
    create_store(
        path,
        identity={},
        layers={"blocks.0": 4},
        targets=["top_1"],
        quantities=["contribution-positive"],
        shards=shards,
    )
    for number in range(2):
        write(path, number)
    finish_store(path)
    return path


def chunk(store: Path, number: int) -> Path:
    return store / f"arrays.zarr/layers/blocks.0/contribution/top_1/positive/c.{number}.0"


def test_verify_says_that_all_is_well_with_exit_code_0(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--quick"], ["--repair"]):
        assert main(["store", "verify", str(store.parent), *options]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "problems  none"


def test_commands_find_the_store_of_a_run_that_keeps_it_elsewhere(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    sections = {"run": {"directory": "."}, "data": {"shards": "."}, "model": {"spec": "torchvision:resnet18"}}
    (other / "config.yaml").write_text(yaml.safe_dump(sections | {"store": {"location": "../run/store"}}))
    assert main(["store", "digest", str(other)]) == 0
    assert capsys.readouterr().out.strip() == ContributionStore(store).digest()
    (other / "config.yaml").write_text(yaml.safe_dump(sections | {"store": {"location": "../nowhere"}}))
    assert main(["store", "digest", str(other)]) == 2


def test_verify_names_damage_and_repair_forgets_it(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["store", "digest", str(store)])
    digest = capsys.readouterr().out
    content = chunk(store, 1).read_bytes()
    chunk(store, 1).write_bytes(content[:9] + b"?" + content[10:])
    assert main(["store", "verify", "--quick", str(store)]) == 0
    capsys.readouterr()
    assert main(["store", "verify", str(store)]) == 1
    out = capsys.readouterr().out
    assert all(word in out for word in ("s-1.tar", "blocks.0", "contribution-positive", "the marker says"))
    assert "s-0.tar" not in out
    assert Ledger(store).pending() == [], "nothing is changed unless asked"
    assert main(["store", "verify", "--repair", str(store)]) == 0
    assert "1 shard to do again" in capsys.readouterr().out
    assert Ledger(store).pending() == [1]
    write(store, 1)
    assert main(["store", "verify", str(store)]) == 0
    capsys.readouterr()
    main(["store", "digest", str(store)])
    assert capsys.readouterr().out == digest


def test_verify_leaves_unexpected_files_and_says_so(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / "notes.txt").write_text("mine")
    (store / "ledger" / ".000001.json.1.partial").write_text("half")
    assert main(["store", "verify", "--repair", str(store)]) == 1
    assert "notes.txt" in capsys.readouterr().out
    assert (store / "notes.txt").exists()
    assert not (store / "ledger" / ".000001.json.1.partial").exists()


def test_repair_does_not_interfere_with_an_extraction(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chunk(store, 1).unlink()
    with Lease(store):
        assert main(["store", "verify", str(store)]) == 1
        assert main(["store", "verify", "--repair", str(store)]) == 2
    assert "is in use by process" in capsys.readouterr().err.splitlines()[-1]
    assert Ledger(store).pending() == []


def test_a_store_goes_to_the_authors_layout_and_back(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("h5py")
    file, again = store.parent / "ours.h5", store.parent / "again"
    assert main(["store", "export", str(store.parent), str(file)]) == 0
    assert "10 rows of 1 layers" in capsys.readouterr().out
    assert main(["store", "import", str(file), str(again), "--layers", "blocks.0", "--rows-per-shard", "4"]) == 0
    assert "3 of 3 done (complete)" in capsys.readouterr().out
    values = [ContributionStore(path).read("blocks.0", "contribution-positive") for path in (store, again)]
    np.testing.assert_array_equal(*values)
    assert main(["store", "export", str(store), str(file)]) == 2
    assert "there is such a file" in capsys.readouterr().err.splitlines()[-1]
