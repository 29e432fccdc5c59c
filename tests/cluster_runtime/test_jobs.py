"""Jobs: sent to the address that was asked for, followed to their end, without secrets."""

import os
from pathlib import Path

import pytest

from codec_dist.cluster_runtime import ClusterError, Session, submit_command, submit_job


@pytest.mark.ray
def test_stage_runs_as_a_job_in_the_folder_that_goes_with_it(
    ray_cluster: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ray_cluster.dashboard is not None
    # The command echoes how it was called: a package of that name in the folder stands in for the real one.
    package = tmp_path / "codec_dist"
    package.mkdir()
    (package / "__init__.py").touch()
    lines = ["import os, sys", "print('called', sys.argv[1:], os.path.exists('config.yaml'), os.path.exists('.env'))"]
    (package / "__main__.py").write_text("\n".join([*lines, "print('secret', os.environ.get('WANDB_API_KEY'))"]))
    (tmp_path / "config.yaml").write_text("run: {}\n")
    (tmp_path / ".env").write_text("WANDB_API_KEY=secret\n")
    monkeypatch.setenv("WANDB_API_KEY", "not-for-the-cluster")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    log: list[str] = []
    outcome = submit_job(
        ray_cluster.dashboard,
        "extract",
        "config.yaml",
        ["--data.limit", "5"],
        working_dir=tmp_path,
        write=log.append,
    )
    assert outcome.succeeded, outcome.message
    text = "".join(log)
    words = ["extract", "config.yaml", "--data.limit", "5", "--cluster.address", "auto"]
    assert f"called {words} True False" in text
    assert "secret None" in text
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


@pytest.mark.ray
def test_failed_stage_reports_its_line_and_exit_code(ray_cluster: Session) -> None:
    assert ray_cluster.dashboard is not None
    log: list[str] = []
    command = ["python", "-m", "codec_dist", "extract", "/nowhere/config.yaml"]
    outcome = submit_command(ray_cluster.dashboard, command, write=log.append)
    assert not outcome.succeeded
    assert outcome.message == "Job entrypoint command failed with exit code 2"
    assert "".join(log).count("error: cannot read the config /nowhere/config.yaml") == 1


def test_address_without_a_jobs_server_is_a_clear_error() -> None:
    with pytest.raises(ClusterError, match=r"no Ray jobs server answers at http://127\.0\.0\.1:1 "):
        submit_command("127.0.0.1:1", ["true"])
    with pytest.raises(ClusterError, match="use the URL of the dashboard"):
        submit_command("ray://127.0.0.1:10001", ["true"])


def test_config_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"config nowhere\.yaml is not in the folder"):
        submit_job("http://127.0.0.1:1", "run", "nowhere.yaml", working_dir=tmp_path)
