"""Remote sources fail for a moment now and then: reading goes on where it stopped, and gives up in the end."""

import functools
import http.server
import io
import os
import threading
import urllib.error
from pathlib import Path

import pytest
import s3_server

from codec_dist.shards import Retries, Sample, ShardError, build_index, load_index, pack, read_shard
from codec_dist.shards.location import ResumingStream, is_transient

QUICK = Retries(attempts=5, pause=0.001, longest=0.002)


class Flaky(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; refuses, or breaks off, as often as its server's plan says."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        plan = self.server.plan
        self.server.requests.append((self.path, self.headers.get("Range")))
        if plan.get("refuse", 0) > 0:
            plan["refuse"] -= 1
            self.send_error(plan.get("status", 503))
        elif self.path.endswith(".tar"):
            self._send_tar(plan)
        else:
            super().do_GET()

    def do_HEAD(self):
        if self.server.plan.get("refuse", 0) > 0:
            self.send_error(self.server.plan.get("status", 503))
        else:
            super().do_HEAD()

    def _send_tar(self, plan):
        content = Path(self.translate_path(self.path)).read_bytes()
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and plan.get("ranges") else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if plan.get("cut", 0) > 0:
            plan["cut"] -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.close_connection = True


@pytest.fixture
def server(tmp_path):
    handler = functools.partial(Flaky, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.plan, running.requests = {}, []
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, daemon=True, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def seen(items):
    return [(item.key, item.label, item.error) for item in items]


@pytest.mark.parametrize("status", [503, 500, 429])
def test_a_busy_server_is_asked_again(packed, server, status):
    server.plan.update(refuse=3, status=status)
    index = load_index(f"{server.url}/shards", retries=QUICK)
    assert index.shards == packed.shards
    server.plan["refuse"] = 3
    items = read_shard(index.location, index.shards[0], retries=QUICK)
    assert seen(items) == seen(read_shard(packed.location, packed.shards[0]))


def test_a_server_that_stays_busy_is_given_up_and_named(packed, server):
    index = load_index(f"{server.url}/shards", retries=QUICK)
    server.plan["refuse"] = 10**6
    with pytest.raises(ShardError, match=r"cannot read http://.*shard-000000.tar: .*503"):
        list(read_shard(index.location, index.shards[0], retries=QUICK))
    before = len(server.requests)
    with pytest.raises(ShardError, match=r"cannot read .*index.parquet: .*503"):
        load_index(f"{server.url}/shards", retries=QUICK)
    assert len(server.requests) - before == QUICK.attempts


@pytest.mark.parametrize("status", [403, 404])
def test_what_will_not_pass_is_not_tried_again(packed, server, status):
    server.plan.update(refuse=10**6, status=status)
    with pytest.raises(ShardError):
        load_index(f"{server.url}/shards", retries=QUICK)
    assert len(server.requests) <= 2  # index.parquet, and the listing where there is none


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_connection_cut_in_mid_body_goes_on_where_it_was_cut(tmp_path, server, ranges):
    # Larger than what a connection holds ready, so that some of it has been read when the cut is seen.
    samples = [Sample(f"{number}", os.urandom(200_000), "png", number) for number in range(30)]
    index = pack(samples, tmp_path / "shards")
    server.plan.update(cut=3, ranges=ranges)
    items = read_shard(f"{server.url}/shards", index.shards[0], retries=QUICK)
    assert seen(items) == seen(read_shard(index.location, index.shards[0]))
    asked = [given for path, given in server.requests if path.endswith(".tar")]
    assert len(asked) == 4
    starts = [int(given.removeprefix("bytes=").removesuffix("-")) if given else 0 for given in asked]
    assert starts == sorted(starts), "no byte that came is asked for again"
    assert starts[-1] > 0


def test_an_index_is_made_over_a_bad_connection(packed, server, tmp_path):
    server.plan.update(cut=4, ranges=True)
    index = build_index(f"{server.url}/shards", tmp_path / "cache", retries=QUICK)
    assert index.shards == packed.shards
    assert index.kept_in == str(tmp_path / "cache")


def test_a_connection_that_is_always_cut_is_an_error(packed, server):
    server.plan.update(cut=10**6, ranges=False)
    with pytest.raises(ShardError, match=r"cannot read http://.*shard-000000.tar"):
        list(read_shard(f"{server.url}/shards", packed.shards[0], retries=QUICK))


def test_pauses_double_up_to_the_longest():
    assert list(Retries(attempts=6, pause=1, longest=5).pauses()) == [1, 2, 4, 5, 5]
    assert sum(Retries().pauses()) == pytest.approx(31.5)


class Breaking:
    """Bytes that break off after every third read."""

    def __init__(self, content, start):
        self._content, self._at, self._reads = content, start, 0

    def read(self, size=-1):
        self._reads += 1
        if self._reads > 3:
            raise ConnectionResetError("lost")
        piece = self._content[self._at : self._at + min(size, 5)]
        self._at += len(piece)
        return piece

    def close(self):
        pass


def test_attempts_are_counted_anew_whenever_bytes_have_come():
    content = os.urandom(400)
    stream = ResumingStream(lambda start: Breaking(content, start), None, Retries(attempts=2, pause=0), "x")
    found = b""
    while piece := stream.read(7):
        found += piece
    assert found == content


def test_a_stream_that_ends_early_is_a_broken_one():
    ends = [10, 25, 40]

    def open_at(start):
        file = io.BytesIO(bytes(range(ends.pop(0))))
        file.seek(start)
        return file

    stream = ResumingStream(open_at, 40, QUICK, "x")
    found = b""
    while piece := stream.read(100):
        found += piece
    assert found == bytes(range(40))


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(16, "busy"), True),
        (urllib.error.HTTPError("x", 503, "busy", None, None), True),
        (urllib.error.HTTPError("x", 403, "no", None, None), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ValueError("anything"), False),
    ],
)
def test_which_errors_may_pass(error, passing):
    assert is_transient(error) == passing


def test_shards_in_an_object_store_read_as_local_ones(packed):
    pytest.importorskip("moto.server", reason="a local S3 server needs moto, flask and flask-cors")
    pytest.importorskip("s3fs", reason="shards in buckets need s3fs (extra s3)")
    import fsspec

    shards = f"s3://{s3_server.BUCKET}/shards"
    with s3_server.reachable():
        files = fsspec.filesystem("s3")
        for info in packed.shards:
            files.put_file(f"{packed.location}/{info.name}", f"{shards}/{info.name}")
        index = load_index(shards, retries=QUICK)
        assert index.shards == packed.shards
        assert index.kept_in == shards
        assert load_index(shards, retries=QUICK) == index
        for info in packed.shards:
            assert seen(read_shard(shards, info)) == seen(read_shard(packed.location, info))
        with pytest.raises(ShardError, match=r"no such file|no such folder"):
            load_index("s3://nowhere/shards", retries=QUICK)
