"""What a store in a bucket promises: all that one on disk does, and patience with a server that is busy."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from torch.utils.data import DataLoader

from codec_dist.cli import main
from codec_dist.store import (
    BlockWriter,
    ContributionStore,
    Lease,
    LeaseError,
    Ledger,
    RowDataset,
    StoreError,
    StoreFullError,
    finish_store,
    repair_store,
    samples_version,
    store_exists,
    verify_store,
)
from codec_dist.store import objects as objects_module
from codec_dist.store.lease import this_process
from codec_dist.store.objects import ObjectPlace

pytest.importorskip("s3fs", reason="stores in buckets need s3fs (extra s3)")
pytest.importorskip("moto.server", reason="a local S3 server needs moto, flask and flask-cors")

import s3_server
import s3fs

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server():
    with s3_server.reachable() as proxy:
        yield proxy


@pytest.fixture
def url(server):
    server.busy = 0
    return f"s3://{s3_server.BUCKET}/run-{next(NUMBERS)}/store"


@pytest.fixture
def remote(url, make_plan):
    """A store in a bucket that is made, with nothing written."""
    plan = make_plan(url)
    plan.create()
    return plan


def write_all(plan):
    for number in range(len(plan.shards)):
        plan.write(number)
    finish_store(plan.path)
    return ContributionStore(plan.path)


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"sharding": 2}], ids=str)
def test_a_store_in_a_bucket_is_the_same_as_one_on_disk(url, tmp_path, make_plan, options):
    plans = [make_plan(url, dropped={1: 2}), make_plan(tmp_path / "store", dropped={1: 2})]
    for plan in plans:
        plan.create(**options)
    stores = [write_all(plan) for plan in plans]
    remote, local = stores
    assert remote.location == url
    assert remote.complete
    assert remote.digest() == local.digest()
    assert remote.identity_hash == local.identity_hash
    assert remote.samples.equals(local.samples)
    for layer, name in plans[0].values(0):
        np.testing.assert_array_equal(remote.read(layer, name), plans[0].expected(layer, name))
    names = remote.chunk_names(seed=3)
    for chunk, other in zip(remote.chunks(names), local.chunks(names), strict=True):
        np.testing.assert_array_equal(chunk.values, other.values)
    batches = RowDataset(url, ["blocks.0"], ["contribution-net"], batch_size=4)
    assert sorted(place for batch in batches for place in batch.indices.tolist()) == list(range(9))
    files = set(ObjectPlace(url).files())
    assert files == {
        str(path.relative_to(tmp_path / "store")) for path in (tmp_path / "store").rglob("*") if path.is_file()
    }
    with pytest.raises(StoreError, match="is at a URL: this needs one in a local folder"):
        _ = remote.path


@pytest.mark.slow
def test_workers_of_a_loader_read_from_a_bucket(remote):
    store = write_all(remote)
    rows = RowDataset(remote.path, ["blocks.0"], ["activation-positive"], batch_size=4)
    batches = list(DataLoader(rows, batch_size=None, num_workers=2))
    assert sorted(place for batch in batches for place in batch.indices.tolist()) == list(range(len(store)))


def test_verify_and_repair_work_in_a_bucket(remote):
    digest = write_all(remote).digest()
    place = ObjectPlace(remote.path)
    assert verify_store(remote.path).ok
    chunk = "arrays.zarr/layers/blocks.0/activation/positive/c.1.0"
    content = place.read(chunk)
    place.write(chunk, bytes([content[0] ^ 1]) + content[1:])
    place.delete(chunk.replace("c.1.0", "c.2.0"))
    place.write("notes.txt", b"mine")
    found = verify_store(remote.path)
    assert [(problem.kind, problem.shard_number) for problem in found.problems] == [
        ("chunk", 1),
        ("chunk", 2),
        ("unexpected", None),
    ]
    assert repair_store(remote.path, found) == [1, 2]
    assert Ledger(remote.path).pending() == [1, 2]
    for number in (1, 2):
        remote.write(number)
    finish_store(remote.path)
    assert ContributionStore(remote.path).digest() == digest


@pytest.mark.slow
def test_a_store_whose_maker_was_killed_is_completed_by_the_next(remote):
    place = ObjectPlace(remote.path)
    for name in place.files("arrays.zarr/layers"):
        place.delete(name)
    remote.create()
    assert write_all(remote).complete
    with pytest.raises(StoreError, match="model: m in the store, n requested"):
        remote.create(identity={"model": "n", "method": {"steps": 10}})


def test_of_two_that_make_a_store_of_different_identity_one_is_refused(url, make_plan):
    refused = []
    gate = threading.Barrier(2)

    def make(model):
        gate.wait()
        try:
            make_plan(url, identity={"model": model}).create()
        except StoreError:
            refused.append(model)

    threads = [threading.Thread(target=make, args=(model,)) for model in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    assert ContributionStore(url).identity == {"model": "b" if refused == ["a"] else "a"}


def test_the_commands_take_urls(remote, capsys):
    digest = write_all(remote).digest()
    run = remote.path.removesuffix("/store")
    assert main(["store", "digest", run]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == digest
    assert main(["store", "verify", remote.path]) == 0
    assert main(["store", "info", remote.path]) == 0
    assert f"store       {remote.path}" in capsys.readouterr().out
    assert main(["store", "info", run + "-nowhere"]) == 2
    assert f"there is no store at {run}-nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_that_is_busy_for_a_while_costs_time_only(server, remote, tmp_path, make_plan, monkeypatch):
    monkeypatch.setattr(objects_module, "FIRST_DELAY_SECONDS", 0.01)
    local = make_plan(tmp_path / "store")
    local.create()
    digest = write_all(local).digest()
    server.refused = 0
    for number in range(3):
        server.busy = 6
        remote.write(number)
    server.busy = 6
    finish_store(remote.path)
    server.busy = 6
    store = ContributionStore(remote.path)
    server.busy = 6
    assert store.digest() == digest
    server.busy = 6
    assert verify_store(remote.path).ok
    assert server.refused == 42


def test_an_exclusive_creation_whose_answer_is_lost_is_still_ours(server, url, monkeypatch):
    place = ObjectPlace(url)
    put = place._objects.pipe_file
    lost = []

    def lose_the_first_answer(*arguments, **options):
        put(*arguments, **options)
        if not lost:
            lost.append(1)
            raise ConnectionError("the line went dead")

    monkeypatch.setattr(place._objects, "pipe_file", lose_the_first_answer)
    assert place.create("lease.json", b"mine")
    assert not place.create("lease.json", b"another's")
    assert place.read("lease.json") == b"mine"


@pytest.mark.slow
def test_patience_ends(server, remote, monkeypatch):
    monkeypatch.setattr(objects_module, "PATIENCE_SECONDS", 0.0)
    writer = BlockWriter(remote.path)
    server.busy = 10_000
    with pytest.raises(
        StoreError, match=r"cannot write shard s-0.tar into s3://.* does not answer: .*reduce your request rate"
    ):
        writer.write(0, remote.values(0), remote.samples(0))
    with pytest.raises(StoreError, match=r"cannot read the store s3://.* does not answer"):
        Ledger(remote.path).pending()
    server.busy = 0
    assert Ledger(remote.path).pending() == [0, 1, 2], "nothing was done"


def test_a_bucket_without_room_is_told_apart_from_one_that_is_busy(server, remote, monkeypatch):
    monkeypatch.setattr(server, "full", True)
    with pytest.raises(StoreFullError, match=r"cannot write shard s-0.tar into s3://.* no space left \(XMinioStorageF"):
        BlockWriter(remote.path).write(0, remote.values(0), remote.samples(0))
    monkeypatch.undo()
    assert Ledger(remote.path).pending() == [0, 1, 2]
    remote.write(0)
    assert len(Ledger(remote.path)) == 1


def test_whether_there_is_a_store_and_which_is_known_without_reading_it(url, make_plan):
    assert not store_exists(url)
    plan = make_plan(url)
    plan.create()
    assert store_exists(url)
    assert samples_version(url) is None
    write_all(plan)
    first = samples_version(url)
    assert samples_version(url) == first is not None
    ObjectPlace(url).write("samples.parquet", ObjectPlace(url).read("samples.parquet") + b" ")
    assert samples_version(url) != first
    ObjectPlace(url).delete("arrays.zarr/zarr.json")
    assert store_exists(url), "what is left of a store is not taken for none"


@pytest.mark.slow
def test_an_address_where_nobody_is_is_given_up_sooner(server, url, monkeypatch):
    monkeypatch.setattr(objects_module, "FIRST_PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"does not answer: EndpointConnectionError"):
        ContributionStore(url)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_chunks_of_a_server_that_does_not_answer_are_not_called_damaged(server, remote, monkeypatch):
    store = write_all(remote)
    monkeypatch.setattr(objects_module, "PATIENCE_SECONDS", 0.0)
    server.busy = 10_000
    with pytest.raises(StoreError, match=r"cannot read .* does not answer") as refused:
        store.read("blocks.0", "activation-positive")
    assert "damaged" not in str(refused.value)
    server.busy = 0


HOLD = (
    "import sys\n"
    "from codec_dist.store import Lease\n"
    "with Lease(sys.argv[1]):\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.readline()\n"
)


def test_a_bucket_is_held_by_one_coordinator_at_a_time(remote):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, remote.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline().strip() == "held"
        with pytest.raises(LeaseError, match=f"in use by process {other.pid}"), Lease(remote.path):
            pass
        other.kill()
        other.wait()
        with Lease(remote.path, heartbeat_seconds=0.01) as lease:
            owner = json.loads(ObjectPlace(remote.path).read("lease.json"))
            assert owner["process"]["pid"] == os.getpid()
            lease.check()
    assert not [name for name in ObjectPlace(remote.path).files() if name.startswith("lease")]


def test_the_lease_of_another_host_ends_by_the_servers_clock(remote):
    place = ObjectPlace(remote.path)
    owner = {"id": "b2", "process": vars(this_process()) | {"host": "far-away"}}
    place.write("lease.json", json.dumps(owner).encode())
    with pytest.raises(LeaseError, match=r"far-away .* its lease ends in (29|30) s"), Lease(remote.path):
        pass
    with Lease(remote.path, patience_seconds=-1):
        pass


def test_a_holder_outlasts_a_server_that_is_busy(remote):
    with Lease(remote.path, patience_seconds=-1) as lease:
        lease.check()


@pytest.mark.slow
def test_the_lease_is_renewed_in_a_bucket(server, remote):
    with Lease(remote.path, heartbeat_seconds=0.01):
        server.requests.clear()
        deadline = time.monotonic() + 10
        while not [path for method, path in server.requests if method == "PUT" and path.endswith("lease.json")]:
            assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host/store", r"stores are in local folders or at s3://, gs://"),
        ("memory://store", "stores are in local folders"),
        ("s3://", "name a bucket and a prefix"),
        ("s3://no-such-bucket-here/store", "no-such-bucket-here"),
    ],
)
def test_urls_that_lead_nowhere_are_refused(server, make_plan, url, message):
    with pytest.raises(StoreError, match=message) as refused:
        make_plan(url).create()
    assert "\n" not in str(refused.value)


def test_without_credentials_there_is_one_clear_line(server, url, make_plan, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"cannot be used: NoCredentialsError"):
        make_plan(url).create()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StoreError, match="needs the package gcsfs: pip install gcsfs"):
        ObjectPlace("gs://bucket/store")
