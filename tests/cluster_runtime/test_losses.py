"""What is said of lost workers, from what Ray 2.60 raised in trials and from what a crash leaves."""

import subprocess
import sys
from pathlib import Path

import pytest
import ray

from codec_dist.cluster_runtime import KernelKills, explain_loss
from codec_dist.utils import kernel_memory_kills

DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 15515\n\tip: 10.0.0.2\nThe actor "
    "is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: {} Some common "
    "causes include: (1) the process was killed by the OOM killer due to high memory usage, (2) ray stop --force was "
    "called, or (3) the worker crashed unexpectedly due to SIGSEGV or another unexpected error."
)
OF_MEMORY = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.2, ID: 24dc28c6) "
    "was 22.48GB used / 23.54GB limit (0.955)\nOOM kill reason: Memory usage 24137897344B exceeded threshold"
)


def _died(detail: str) -> ray.exceptions.RayActorError:
    return ray.exceptions.RayActorError("a", DIED.format(detail))


@pytest.mark.parametrize(
    ("error", "cause", "datum"),
    [
        (ray.exceptions.OutOfMemoryError(OF_MEMORY), "killed for memory", "22.48GB of 23.54GB were used on 10.0.0.2"),
        (RuntimeError(f"Worker failed: {OF_MEMORY}"), "killed for memory", "22.48GB of 23.54GB"),
        (ray.exceptions.NodeDiedError("gone"), "node gone", "node"),
        (_died("Worker exits with an exit code 3."), "crashed", "exit code 3"),
        (_died("Worker unexpectedly exits with a connection error code 2."), "killed or crashed", "killed"),
        (ray.exceptions.ActorUnavailableError("Socket closed", b"\0" * 16), "unreachable", "reached"),
    ],
    ids=["by Ray", "by Ray, told by a trainer", "node", "exit code", "no trace", "unavailable"],
)
def test_each_kind_of_loss_has_its_words(error: Exception, cause: str, datum: str) -> None:
    loss = explain_loss(error)
    assert loss.cause == cause
    assert datum in loss.text
    assert "\n" not in loss.text


@pytest.mark.parametrize(
    ("end", "signal"),
    [("ctypes.string_at(0)", "SIGSEGV"), ("os.abort()", "SIGABRT"), ("os.kill(os.getpid(), signal.SIGFPE)", "SIGFPE")],
)
def test_the_signal_of_a_crash_is_told(tmp_path: Path, end: str, signal: str) -> None:
    file = tmp_path / "crash"
    program = (
        "import ctypes, os, signal, sys\nfrom pathlib import Path\n"
        f"from codec_dist.cluster_runtime import record_crashes\nrecord_crashes(Path(sys.argv[1]))\n{end}"
    )
    assert subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True).returncode < 0
    loss = explain_loss(_died("Worker unexpectedly exits with a connection error code 2."), crash_file=file)
    assert loss.cause == "crashed"
    assert signal in loss.text


def test_a_process_that_did_not_crash_leaves_no_signal(tmp_path: Path) -> None:
    (tmp_path / "crash").write_text("")
    assert explain_loss(_died("End of file."), crash_file=tmp_path / "crash").cause == "killed or crashed"
    assert explain_loss(_died("End of file."), crash_file=tmp_path / "nowhere").cause == "killed or crashed"


def test_a_kill_that_the_kernel_counted_is_for_memory() -> None:
    assert explain_loss(_died("End of file."), killed_by_kernel=lambda: True).cause == "killed for memory"
    assert explain_loss(_died("End of file."), killed_by_kernel=lambda: False).cause == "killed or crashed"


def test_each_kill_of_the_kernel_explains_one_loss_and_none_much_later(tmp_path: Path) -> None:
    membership, events = tmp_path / "cgroup", tmp_path / "memory.events"
    membership.write_text("0::/\n")

    def killed(count: int) -> None:
        events.write_text(f"low 0\noom 9\noom_kill {count}\noom_group_kill 0\n")

    killed(3)  # before this run
    kills = KernelKills(lambda: kernel_memory_kills(tmp_path, membership))
    assert not kills.claim()
    killed(5)  # two at once, of which both losses are heard one after the other
    assert [kills.claim() for _ in range(3)] == [True, True, False]
    killed(6)
    kills.forget_old()  # it may be a worker whose loss is not known yet
    assert kills.claim()
    killed(7)
    for _ in range(2):
        kills.forget_old()
    assert not kills.claim()  # seconds later it was another process


def test_where_the_kernel_tells_no_kills_nothing_is_blamed_on_it() -> None:
    assert not KernelKills(lambda: None).claim()
