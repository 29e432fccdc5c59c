"""Credentials in the address of the shards: the run works with them, and nobody is shown them."""

import base64
import functools
import http.server
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from digits_config import digits_values

from codec_dist.cli import main
from codec_dist.config import load_config
from codec_dist.shards import digits, pack
from codec_dist.store import ContributionStore

SECRET = "tiger-7f3a"
BASIC = "Basic " + base64.b64encode(f"reader:{SECRET}".encode()).decode()


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Serves a folder to those who know the password, or the token of a signed address."""

    def send_head(self):  # type: ignore[no-untyped-def]
        if self.headers.get("Authorization") == BASIC or f"token={SECRET}" in self.path.partition("?")[2]:
            return super().send_head()
        self.send_error(401)
        return None

    def log_message(self, format: str, *arguments: object) -> None:
        """Quietly."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    samples, classes = digits()
    pack(itertools.islice(samples, 40), tmp_path / "data" / "shards", samples_per_shard=20, classes=classes)
    handler = functools.partial(Guarded, directory=str(tmp_path / "data"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving
        serving.shutdown()


@pytest.mark.ray
@pytest.mark.parametrize("form", ["http://reader:{secret}@{host}/shards", "http://{host}/shards?token={secret}"])
def test_a_run_works_with_them_and_shows_them_nowhere(
    form: str,
    server: http.server.ThreadingHTTPServer,
    tmp_path: Path,
    ray_cluster: object,
    capfd: pytest.CaptureFixture[str],
) -> None:
    host = f"127.0.0.1:{server.server_address[1]}"
    location = form.format(secret=SECRET, host=host)
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(digits_values({"run": {"directory": "run"}, "data": {"shards": location}})))
    assert main(["extract", str(config)]) == 0, capfd.readouterr().err
    assert len(ContributionStore(run / "store").samples) == 40
    assert main(["report", str(config)]) == 0
    assert main(["extract", str(config), "--debug"]) == 0
    assert main(["config", "show", "--no-check", str(config)]) == 0
    assert main(["shards", "index", location]) == 2  # the server takes no files
    assert main(["extract", str(config), "--data.shards", location.replace("/shards", "/absent")]) == 2
    written = capfd.readouterr()
    assert "absent" in written.err
    assert SECRET not in written.out + written.err
    assert load_config(run / "config.yaml").data.shards == f"http://{host}/shards"
    for file in run.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_a_report_does_not_wait_for_shards_that_do_not_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        values = digits_values(
            {"run": {"directory": "run"}, "data": {"shards": f"http://reader:{SECRET}@{host}/shards"}}
        )
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        (tmp_path / "run").mkdir()
        assert main(["report", str(tmp_path / "config.yaml")]) == 0
    # By the stage's own clock: starting Python does not count.
    assert json.loads((tmp_path / "run" / "stages" / "report.json").read_text())["seconds"] < 20
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert host in page.partition("<pre")[0]
    assert SECRET not in page + capsys.readouterr().err
