"""What the lease promises: one coordinator at a time, and the dead do not stand in the way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest

from codec_dist.store import Lease, LeaseError
from codec_dist.store.lease import this_process

HOLD = (
    "import sys\n"
    "from codec_dist.store import Lease, LeaseError\n"
    "try:\n"
    "    with Lease(sys.argv[1]):\n"
    "        print('held', flush=True)\n"
    "        sys.stdin.readline()\n"
    "except LeaseError as error:\n"
    "    print(error, flush=True)\n"
    "    sys.stdin.readline()\n"
)


@contextmanager
def process(path, wait=True):
    """Another process that holds the lease, or was refused; its first line, and itself."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            yield other.stdout.readline().strip() if wait else None, other
        finally:
            other.kill()


@pytest.fixture
def store(tmp_path):
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def test_a_second_holder_is_refused_by_name_and_served_after_the_first(store):
    with process(store) as (said, other):
        assert said == "held"
        with pytest.raises(LeaseError) as refused, Lease(store):
            pass
        assert f"in use by process {other.pid} on host {this_process().host}" in str(refused.value)
        assert "\n" not in str(refused.value)
        other.stdin.write("\n")
        other.stdin.close()
        assert other.wait() == 0
        with Lease(store), process(store) as (said, _):
            assert f"in use by process {os.getpid()}" in said
    assert os.listdir(store) == []


def test_two_leases_of_one_process_exclude_each_other(store):
    with Lease(store), pytest.raises(LeaseError, match=f"process {os.getpid()}"), Lease(store):
        pass
    with Lease(store) as lease:
        lease.check()


def test_a_killed_holder_on_this_host_is_succeeded_at_once(store):
    with process(store) as (said, other):
        assert said == "held"
        os.kill(other.pid, signal.SIGKILL)
        # Not even collected by its parent: a zombie.
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        with Lease(store) as lease:
            lease.check()
            assert json.loads((store / "lease.json").read_text())["process"]["pid"] == os.getpid()
    assert os.listdir(store) == []


def test_another_process_with_the_number_of_the_dead_one_is_not_taken_for_it(store):
    owner = {"id": "a1", "process": vars(this_process()) | {"started": "12"}}
    (store / "lease.json").write_text(json.dumps(owner))
    with Lease(store) as lease:
        lease.check()


def other_host(store, **changes):
    owner = {"id": "b2", "process": vars(this_process()) | {"host": "far-away", "pid": 77} | changes}
    (store / "lease.json").write_text(json.dumps(owner))


@pytest.mark.parametrize("owner", ["another host", "this host before it was started again", "nobody"])
def test_what_cannot_be_asked_is_succeeded_after_thirty_seconds(store, owner):
    if owner == "nobody":
        (store / "lease.json").write_text("{")
    else:
        other_host(store, **({} if owner == "another host" else {"host": this_process().host, "system": "earlier"}))
    with pytest.raises(LeaseError, match=r"last sign of life 29 s ago.* its lease ends in 1 s"):
        Lease(store, age=lambda name: 29.0).__enter__()
    with Lease(store, age=lambda name: 31.0) as lease:
        lease.check()


def test_the_age_of_a_lease_is_that_of_its_file(store):
    other_host(store)
    with pytest.raises(LeaseError, match=r"process 77 on host far-away \(last sign of life 0 s ago\)"), Lease(store):
        pass
    past = time.time() - 40
    os.utime(store / "lease.json", (past, past))
    with Lease(store) as lease:
        lease.check()


def test_of_many_that_find_a_dead_holder_one_alone_succeeds(store):
    with process(store) as (_, other):
        other.kill()
        other.wait()
    with ExitStack() as stack:
        started = [stack.enter_context(process(store, wait=False)) for _ in range(4)]
        said = [other.stdout.readline().strip() for _, other in started]
        assert said.count("held") == 1, said
        assert all("in use by process" in line for line in said if line != "held")
        assert sorted(os.listdir(store)) == ["lease.json"]


def test_threads_that_find_a_dead_holder_take_turns(store):
    other_host(store)
    at_once, most, refused = [], [], []
    gate = threading.Barrier(8)

    def contend():
        gate.wait()
        for _ in range(20):
            try:
                with Lease(store, age=lambda name: 31.0):
                    at_once.append(1)
                    most.append(len(at_once))
                    at_once.pop()
            except LeaseError:
                refused.append(1)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most
    assert max(most) == 1
    assert os.listdir(store) == []


def test_an_heir_that_died_before_it_had_the_lease_is_succeeded_too(store):
    other_host(store)
    heir = {"id": "c3", "process": vars(this_process()) | {"started": "12"}}
    (store / "lease.b2.claim").write_text(json.dumps(heir))
    with Lease(store, age=lambda name: 31.0) as lease:
        lease.check()
        assert os.listdir(store) == ["lease.json"]


def test_an_heir_that_lives_is_named(store):
    other_host(store)
    (store / "lease.b2.claim").write_text(json.dumps({"id": "c3", "process": vars(this_process())}))
    with pytest.raises(LeaseError, match=f"process {os.getpid()}"):
        Lease(store, age=lambda name: 31.0).__enter__()


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 10 s"


def test_the_lease_is_renewed_while_it_is_held(store):
    with Lease(store, heartbeat_seconds=0.01):
        past = time.time() - 40
        os.utime(store / "lease.json", (past, past))
        until(lambda: os.stat(store / "lease.json").st_mtime > past + 1)


@pytest.mark.parametrize("how", ["taken over", "removed"])
def test_a_holder_whose_lease_is_gone_learns_of_it_and_leaves_the_other_alone(store, how):
    with Lease(store, heartbeat_seconds=0.01) as lease:
        if how == "removed":
            os.unlink(store / "lease.json")
        else:
            other_host(store)
        until(lambda: lost(lease))
        with pytest.raises(LeaseError, match="far-away has taken it over" if how == "taken over" else "was removed"):
            lease.check()
    assert os.listdir(store) == (["lease.json"] if how == "taken over" else [])


def lost(lease):
    with suppress(LeaseError):
        lease.check()
        return False
    return True


def test_a_holder_that_could_not_renew_for_too_long_must_not_go_on(store):
    with Lease(store, heartbeat_seconds=60, patience_seconds=0.0) as lease:
        until(lambda: lost(lease))


def test_the_lease_is_given_back_after_an_error_too(store):
    with pytest.raises(KeyError), Lease(store):
        raise KeyError
    assert os.listdir(store) == []


def test_a_folder_made_for_the_lease_alone_is_removed_with_it(tmp_path):
    with Lease(tmp_path / "new" / "store"):
        assert (tmp_path / "new" / "store" / "lease.json").exists()
    assert not (tmp_path / "new" / "store").exists()
    with Lease(tmp_path / "new" / "store"):
        (tmp_path / "new" / "store" / "file").write_text("x")
    assert (tmp_path / "new" / "store" / "file").exists()


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LeaseError, match=r"cannot take the lease of the store .*file/store: "):
        Lease(tmp_path / "file" / "store").__enter__()


def test_file_systems_without_links_have_leases_too(store, monkeypatch):
    def refuse(*names):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Lease(store), process(store) as (said, _):
        assert f"in use by process {os.getpid()}" in said
    assert os.listdir(store) == []
