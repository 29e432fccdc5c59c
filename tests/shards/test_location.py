"""Where shards may be: local paths and web servers for real; other schemes refused by name."""

import functools
import http.server
import importlib.util
import threading
from pathlib import Path

import pytest

from codec_dist.shards import Retries, ShardError, load_index, read_shard


@pytest.fixture
def server(tmp_path):
    """A web server on loopback over the folder of the test; yields its URL."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_shards_on_a_web_server_read_as_local_ones(packed, server):
    index = load_index(f"{server}/shards/")
    assert (index.shards, index.fingerprint, index.classes) == (packed.shards, packed.fingerprint, packed.classes)
    assert index.samples().equals(packed.samples())
    remote = [(item.key, item.label, item.error) for item in read_shard(index.location, index.shards[0])]
    assert remote == [(item.key, item.label, item.error) for item in read_shard(packed.location, packed.shards[0])]


def test_the_index_of_a_read_only_source_is_kept_in_the_cache(packed, server, tmp_path):
    for name in ("index.parquet", "index-samples.parquet"):
        Path(packed.location, name).unlink()
    url, cache = f"{server}/shards", tmp_path / "cache"
    index = load_index(url, cache)
    assert index.shards == packed.shards
    assert {path.name for path in cache.iterdir()} == {"index.parquet", "index-samples.parquet"}
    times = [path.stat().st_mtime_ns for path in cache.iterdir()]
    assert load_index(url, cache) == index
    assert times == [path.stat().st_mtime_ns for path in cache.iterdir()]
    without_cache = load_index(url)
    assert without_cache.kept_in is None
    assert without_cache.samples().equals(index.samples())


def test_missing_files_on_a_web_server_are_clear_errors(packed, server):
    index = load_index(f"{server}/shards")
    Path(packed.location, "shard-000000.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000000.tar: there is no such file"):
        list(read_shard(index.location, index.shards[0]))
    with pytest.raises(ShardError, match=r"cannot list http://.*nowhere"):
        load_index(f"{server}/nowhere")


def test_a_server_that_is_not_there_is_a_clear_error():
    with pytest.raises(ShardError, match=r"cannot read http://127.0.0.1:9/x/index.parquet"):
        load_index("http://127.0.0.1:9/x", retries=Retries(pause=0.001))


@pytest.mark.parametrize(
    "location",
    ["ftp://host/x", "file:///tmp", "memory://x", "simplecache::s3://bucket/x", "PIPE://x", "filecache::http://x"],
)
def test_other_schemes_are_refused(location):
    with pytest.raises(ShardError, match=r"shards are read from local paths, s3://, gs://"):
        load_index(location)


def test_a_shell_command_is_only_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(ShardError, match="there is no such folder"):
        load_index(f"pipe:touch {tmp_path}/owned")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(scheme, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ShardError, match=f"needs the package {package}: pip install {package}"):
        load_index(f"{scheme}://bucket/shards")
