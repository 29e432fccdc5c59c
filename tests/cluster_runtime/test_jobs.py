"""Jobs: sent to the address that was asked for, followed to their end, without secrets."""

import os
import re
import signal
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

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


class Cable:
    """Carries TCP connections to a server, until a word passes on one of them: then all break, and later ones too."""

    def __init__(self, url: str, cut_at: bytes) -> None:
        self._target, self._cut_at, self._cut = urlsplit(url), cut_at, False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near = self._listener.accept()[0]
            if self._cut:
                near.close()
                continue
            far = socket.create_connection((self._target.hostname, self._target.port))
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while (piece := source.recv(65536)) and not self._cut:
                if self._cut_at in piece:
                    self._cut = True
                    break
                sink.sendall(piece)
        except OSError:
            pass  # the other direction ended it
        for end in self._open if self._cut else (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


# Says a word that is not in its own text, then waits for a file.
WAITING = ["sh", "-c", 'echo on its "way"; while [ ! -e "$0" ]; do sleep 0.1; done']


def _check_job_runs_on(text: str, url: str, dashboard: str, file: Path) -> None:
    from ray.job_submission import JobSubmissionClient

    job_id = re.findall(r"job (raysubmit_\w+) runs on", text)[0]
    assert f"`ray job logs {job_id} --address {url}`" in text
    assert f"`ray job stop {job_id} --address {url}`" in text
    client = JobSubmissionClient(dashboard)
    try:
        assert not client.get_job_status(job_id).is_terminal()
    finally:
        file.touch()


@pytest.mark.ray
@pytest.mark.parametrize("cut_at", [b"/logs/tail", b"on its way"], ids=["before the log", "amid the log"])
def test_lost_connection_names_the_job_that_runs_on(ray_cluster: Session, tmp_path: Path, cut_at: bytes) -> None:
    assert ray_cluster.dashboard is not None
    cable = Cable(ray_cluster.dashboard, cut_at)
    with pytest.raises(ClusterError, match=r"^lost the connection to") as found:
        submit_command(cable.url, [*WAITING, str(tmp_path / "go")], write=lambda text: None)
    _check_job_runs_on(str(found.value), cable.url, ray_cluster.dashboard, tmp_path / "go")


@pytest.mark.ray
def test_interrupted_following_names_the_job_that_runs_on(ray_cluster: Session, tmp_path: Path) -> None:
    assert ray_cluster.dashboard is not None

    def interrupt(text: str) -> None:
        if "on its way" in text:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(ClusterError, match=r"^interrupted, but job") as found:
        submit_command(ray_cluster.dashboard, [*WAITING, str(tmp_path / "go")], write=interrupt)
    _check_job_runs_on(str(found.value), ray_cluster.dashboard, ray_cluster.dashboard, tmp_path / "go")


@pytest.mark.ray
def test_refused_job_is_said_to_be_refused(ray_cluster: Session) -> None:
    assert ray_cluster.dashboard is not None
    cable = Cable(ray_cluster.dashboard, b"POST /api/jobs/")
    with pytest.raises(ClusterError, match=rf"^the cluster at {cable.url} refused the job: "):
        submit_command(cable.url, ["true"])


def test_address_without_a_jobs_server_is_a_clear_error() -> None:
    with pytest.raises(ClusterError, match=r"no Ray jobs server answers at http://127\.0\.0\.1:1 "):
        submit_command("127.0.0.1:1", ["true"])
    with pytest.raises(ClusterError, match="use the URL of the dashboard"):
        submit_command("ray://127.0.0.1:10001", ["true"])


def test_config_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"config nowhere\.yaml is not in the folder"):
        submit_job("http://127.0.0.1:1", "run", "nowhere.yaml", working_dir=tmp_path)


class Impostor:
    """A server on loopback that answers every connection with the same bytes."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            near = self._listener.accept()[0]
            near.recv(65536)
            near.sendall(self._answer)
            near.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nblog",
        b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{\"version\": \"1\"}"[:-1],
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        bytes([0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 5, 0, 0, 64, 0]),  # HTTP/2, as Ray's head speaks it
        b"",
    ],
    ids=["page", "other version", "list", "no text", "not found", "ssh", "grpc", "nothing"],
)  # fmt: skip
def test_another_server_than_rays_is_one_line(answer: bytes) -> None:
    address = Impostor(answer).address
    with pytest.raises(ClusterError) as found:
        submit_command(address, ["true"])
    assert address in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.ray
def test_the_port_of_rays_head_is_refused_for_jobs(ray_cluster: Session) -> None:
    with pytest.raises(ClusterError, match="answers, but not as a Ray jobs server") as found:
        submit_command(ray_cluster.address, ["true"])
    assert ray_cluster.address in str(found.value)
    assert "8265" in str(found.value)
