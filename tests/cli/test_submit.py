"""A stage that is sent to a cluster does what it does here."""

from pathlib import Path

import pytest
import yaml

from codec_dist.cli import main
from codec_dist.cluster_runtime import Session
from codec_dist.shards import digits, pack
from codec_dist.store import ContributionStore


@pytest.mark.ray
@pytest.mark.slow
def test_submitted_extraction_writes_the_store_of_a_local_one(ray_cluster: Session, tmp_path: Path) -> None:
    assert ray_cluster.dashboard is not None
    samples, classes = digits()
    few = [sample for sample in samples if int(sample.key.removeprefix("digit-")) < 60]
    pack(few, tmp_path / "shards", samples_per_shard=30, classes=classes)
    values = {
        "run": {"directory": "run"},
        "data": {"shards": "shards"},
        "model": {
            "spec": "module:codec_dist.demo.classifier:digits_classifier",
            "weights": "none",
            "preprocessing": {"size": 16, "channels": 1, "mean": [0.3], "std": [0.38]},
        },
        "attribution": {"layers": ["blocks.5"], "method": {"name": "integrated_gradients", "options": {"steps": 1}}},
        "tracking": {"mode": "disabled"},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    assert main(["submit", "extract", str(config), "--address", ray_cluster.dashboard]) == 0
    assert main(["extract", str(config), "--run.directory", str(tmp_path / "local")]) == 0
    submitted, local = (ContributionStore(tmp_path / name / "store") for name in ("run", "local"))
    assert submitted.complete
    assert len(submitted.samples) == 60
    assert submitted.digest() == local.digest()
