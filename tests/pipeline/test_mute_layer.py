"""A layer without contributions is left out of training, and all stages after it go on without it and say so."""

import itertools
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from digits_config import digits_values

from codec_dist.cli import main
from codec_dist.shards import digits, pack

pytestmark = [pytest.mark.ray, pytest.mark.slow]

VALUES = digits_values(
    {
        "run": {"directory": "run"},
        "data": {"shards": "shards"},
        "model": {"spec": "module:mute_classifier:mute_classifier"},
        "attribution": {"layers": ["blocks.5", "mute"]},
        "sae": {
            "groups": [{"architecture": {"name": "topk", "options": {"modes": 16, "k": 2}}, "training": {"epochs": 2}}]
        },
        "interventions": {"percentages": [50], "off_targets": 1, "random_draws": 1, "images_per_class": 2},
        "visualization": {"modes": 1, "images": 1},
        "cluster": {"training_workers": 1},
        "tracking": {"mode": "disabled"},
    }
)


@pytest.mark.parametrize("activations", [True, False])
def test_a_layer_without_contributions_stops_no_stage(
    tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    activations: bool,
) -> None:  # fmt: skip
    # Where the workers of the session's cluster find models, too.
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "extraction")
    samples, classes = digits()
    pack(itertools.islice(samples, 300), tmp_path / "shards", samples_per_shard=100, classes=classes)
    values = dict(VALUES)
    if not activations:  # then the layer has nothing at all
        values["attribution"] = values["attribution"] | {"activations": False}
        values["sae"] = {"groups": [values["sae"]["groups"][0] | {"quantities": ["contribution-positive"]}]}
        values["interventions"] = values["interventions"] | {"quantities": ["contribution-positive"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", str(tmp_path / "config.yaml")]) == 0
    told = capsys.readouterr().err.splitlines()
    for stage in ("train", "interventions", "visualization"):
        assert any(line.startswith(f"{stage}: ") and "mute, contribution-positive" in line for line in told)
    run = tmp_path / "run"
    selected = json.loads((run / "sae/selected.json").read_text())
    assert selected["blocks.5"].keys() >= {"contribution-positive"}
    assert "contribution-positive" not in selected.get("mute", {})
    assert ("mute" in selected) == activations
    assert "blocks.5" in set(pq.read_table(run / "interventions/curves.parquet")["layer"].to_pylist())
    page = (run / "report/index.html").read_text()
    assert "could not be trained" in page
    assert "mute, contribution-positive" in page
    # What is done is not done again.
    assert main(["run", str(tmp_path / "config.yaml")]) == 0
    assert "train: done already" in capsys.readouterr().err
