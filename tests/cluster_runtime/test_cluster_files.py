"""The files that start clusters are what Ray, KubeRay and Slurm take."""

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
STAGES = {"extract", "train", "summarize", "intervene", "visualize", "report", "run"}


def _load(name: str) -> dict:
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.mark.parametrize("name", ["ray-autoscaler.yaml", "kuberay-rayjob.yaml", "slurm.sh", "Dockerfile"])
def test_file_starts_with_its_three_line_howto(name: str) -> None:
    lines = [line for line in (CLUSTER / name).read_text().splitlines() if not line.startswith("#!")]
    assert [line[:5] for line in lines[:3]] == ["# 1. ", "# 2. ", "# 3. "]
    assert not lines[3].startswith("#")


def test_autoscaler_config_passes_rays_own_validation() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(_load("ray-autoscaler.yaml"))
    config.setdefault("cluster_synced_files", [])
    validate_config(config)
    assert config["available_node_types"]["gpu"]["max_workers"] == config["max_workers"]


def test_rays_validation_refuses_a_broken_autoscaler_config() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(_load("ray-autoscaler.yaml") | {"head_node_type": "nothing"})
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(config)


def test_rayjob_describes_a_cluster_that_ray_can_scale() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    job = _load("kuberay-rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    resource = {"metadata": {"name": "codec-dist", "namespace": "default"}, "spec": cluster}
    config = _derive_autoscaling_config_from_ray_cr(resource)
    workers = config["available_node_types"]["gpu"]
    assert workers["resources"]["GPU"] == 1
    assert (workers["min_workers"], workers["max_workers"]) == (1, 8)
    assert config["available_node_types"][config["head_node_type"]]["resources"].get("GPU", 0) == 0


def test_dashboards_that_are_reachable_ask_for_a_token() -> None:
    cluster = _load("kuberay-rayjob.yaml")["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    assert cluster["authOptions"] == {"mode": "token"}
    starts = _load("ray-autoscaler.yaml")
    commands = starts["head_start_ray_commands"][-1:] + starts["worker_start_ray_commands"][-1:]
    assert all("RAY_AUTH_MODE=token" in command for command in commands)
    assert "--dashboard-host=127.0.0.1" in commands[0]
    assert "export RAY_AUTH_MODE=token" in (CLUSTER / "slurm.sh").read_text()


def test_slurm_script_is_valid_bash_and_starts_one_task_per_node() -> None:
    script = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "#SBATCH --ntasks-per-node=1" in text
    assert "ray symmetric-run" in text
    wait = re.search(r"RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=(\d+)", text)
    assert wait is not None
    assert int(wait[1]) >= 300


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_entry_point_of_a_job_is_the_command(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(call: Callable[[], object]) -> str:
        with pytest.raises(SystemExit) as end:
            call()
        assert end.value.code == 0
        return capsys.readouterr().out

    path = str(ROOT / "jobs" / f"{stage}.py")
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    by_file = answer(lambda: runpy.run_path(path, run_name="__main__"))
    monkeypatch.setattr(sys, "argv", ["codec_dist", stage, "--help"])
    assert by_file == answer(lambda: runpy.run_module("codec_dist", run_name="__main__", alter_sys=True))
    assert "CONFIG" in by_file.upper()


def test_every_stage_has_an_entry_point() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == STAGES
