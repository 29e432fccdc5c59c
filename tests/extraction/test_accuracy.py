"""Extraction says early how well predictions agree with labels, and keeps the totals over an interrupted run."""

import io
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from codec_dist.cli import main
from codec_dist.shards import Sample, load_index, pack
from codec_dist.tracking import read_metrics

SHARDS, PER_SHARD = 3, 20


def picture(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 20 * level).save(buffer, format="png")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def network_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here as well as in the actors."""
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """The config of a run over pictures of ten grey levels, labelled by a function of the level."""

    def write(label: Callable[[int], int | None], outputs: int, classes: int) -> Path:
        levels = [number % 10 for number in range(SHARDS * PER_SHARD)]
        samples = [Sample(f"p{n:03}", picture(level), "png", label(level)) for n, level in enumerate(levels)]
        pack(samples, tmp_path / "shards", samples_per_shard=PER_SHARD, classes=[f"c{n}" for n in range(classes)])
        values = {
            "run": {"directory": str(tmp_path / "run")},
            "data": {"shards": str(tmp_path / "shards")},
            "model": {
                "spec": "module:brightness_classifier:brightness_classifier",
                "options": {"outputs": outputs},
            },
            "attribution": {"layers": ["layer"], "method": {"name": "activation_gradient"}},
            "cluster": {"actors": 1},
            "tracking": {"mode": "disabled"},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def said(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if any(word in line for word in words or ("accuracy ", "warning: "))]


@pytest.mark.ray
def test_accuracy_is_said_after_the_first_shard_and_at_the_end(
    make: Callable[..., Path], ray_cluster: object, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Three of the ten levels bear a wrong label.
    config = make(lambda level: (level + 5) % 10 if level < 3 else level, outputs=10, classes=10)
    right = [int(key[1:]) % 10 >= 3 for key in load_index(tmp_path / "shards").samples()["key"].to_pylist()]
    assert main(["extract", str(config)]) == 0
    told = capsys.readouterr().err.splitlines()
    shards = [sum(right[n : n + PER_SHARD]) for n in range(0, len(right), PER_SHARD)]
    entries = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    points = [entry["metrics"] for entry in entries if "extract/accuracy" in entry.get("metrics", {})]
    # Two shards are in flight, and either may end first.
    ways = [list(itertools.accumulate(order)) for order in itertools.permutations(shards)]
    counts = [round(point["extract/accuracy"] * PER_SHARD * n) for n, point in enumerate(points, start=1)]
    assert counts in ways
    assert [line for line in told if "accuracy " in line or "warning: " in line] == [
        f"extract: accuracy {100 * counts[0] / PER_SHARD:.1f} % on {PER_SHARD} labelled images",
        f"extract: accuracy 70.0 % on {SHARDS * PER_SHARD} labelled images",
    ]
    _check_preprocessing(told, tmp_path / "run")
    summaries = [entry["summary"] for entry in entries if "extract/accuracy" in entry.get("summary", {})]
    assert summaries[-1]["extract/accuracy"] == pytest.approx(0.7)
    assert summaries[-1]["extract/labelled"] == SHARDS * PER_SHARD

    # The run's own config goes on with the same run.
    assert main(["extract", str(tmp_path / "run" / "config.yaml")]) == 0
    assert said(capsys, "done already")
    main(["store", "digest", str(tmp_path / "run")])
    digest = capsys.readouterr().out
    (tmp_path / "run" / "store" / "ledger" / "000001.json").unlink()
    assert main(["extract", str(config)]) == 0
    # One shard is done again; the others' labels are counted, too.
    assert said(capsys)[-1] == f"extract: accuracy 70.0 % on {SHARDS * PER_SHARD} labelled images"
    main(["store", "digest", str(tmp_path / "run")])
    assert capsys.readouterr().out == digest


def _check_preprocessing(told: list[str], run: Path) -> None:
    """That which follows from the model is said, and kept in the run's config."""
    first = next(line for line in told if line.startswith("extract: "))
    assert "8 x 8" in first
    assert "attribute `preprocessing` of BrightnessClassifier" in first
    kept = yaml.safe_load((run / "config.yaml").read_text())["model"]["preprocessing"]
    assert (kept["size"], kept["channels"], kept["mean"], kept["std"]) == (8, 1, [0.0], [1.0])
    assert "BrightnessClassifier" in kept["source"]


@pytest.mark.ray
@pytest.mark.slow
def test_labels_of_another_numbering_are_noticed_after_the_first_shard(
    make: Callable[..., Path], ray_cluster: object, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(lambda level: (level + 1) % 10, outputs=13, classes=10)
    assert main(["extract", str(config)]) == 0
    lines = said(capsys)
    assert lines[0] == f"extract: accuracy 0.0 % on {PER_SHARD} labelled images"
    assert f"0 of {PER_SHARD} images" in lines[1]
    assert "13 outputs" in lines[2]
    final = lines[-3:]
    assert f"0 of {SHARDS * PER_SHARD} images" in final[1]
    assert "1 below" in final[1]


@pytest.mark.ray
@pytest.mark.slow
def test_nothing_is_said_of_images_without_labels(
    make: Callable[..., Path], ray_cluster: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["extract", str(make(lambda level: None, outputs=10, classes=10))]) == 0
    assert said(capsys) == []
