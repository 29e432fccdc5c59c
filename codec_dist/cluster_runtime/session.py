"""A Ray session: on this machine, closed to the outside, or on a cluster that is running already."""

import functools
import http.client
import inspect
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import ray

from codec_dist.cluster_runtime.errors import ClusterError
from codec_dist.config import ClusterSection
from codec_dist.utils import environment

LOGGER = logging.getLogger(__name__)

# Ray sets it when it starts.
RAY_SETS = ("RAY_AUTH_MODE",)
# Names a cluster to all of Ray's programs, and to the commands of its jobs their own.
RAY_ADDRESS = "RAY_ADDRESS"

# Ray puts Unix sockets 67 characters below its folder, and their paths may have 107.
ADDRESS_FILE = "ray_current_cluster"
"""What ``ray start`` leaves in Ray's temporary folder, and ``ray.init`` does not."""
LONGEST_TEMPORARY_FOLDER = 40
STARTS = 3

SECONDS_TO_ANSWER = 10.0
LONGEST_ANSWER = 1 << 16


@dataclass(frozen=True)
class Session:
    """A live connection to Ray: ``address`` is HOST:PORT, ``dashboard`` the URL that takes jobs (or None)."""

    address: str
    dashboard: str | None


@contextmanager
def ray_session(cluster: ClusterSection, *, num_cpus: int | None = None, dashboard: bool = False) -> Iterator[Session]:
    """Connect to Ray for the length of a ``with`` block.

    Joins ``cluster.address``; without one, the cluster that RAY_ADDRESS names (Ray sets it for the commands of its
    jobs, so inside of a job this is the job's cluster); without either, starts Ray on this machine: bound to
    loopback, guarded by a token that lives only in this process's environment, without usage reports and with quiet
    logs. What was started is ended with the block, whatever ends it. A Ray that is initialised already is reused and
    left running.

    Args:
        cluster: the config's section.
        num_cpus: CPUs of a Ray started here; default: the machine's, or what the section asks for if
            that is more.
        dashboard: whether a Ray started here serves its dashboard and takes jobs (on loopback).

    Raises:
        ClusterError: the address does not answer, or this machine is not a node of that cluster.
    """
    address, name = (cluster.address, "cluster.address") if cluster.address else (_surrounding_cluster(), RAY_ADDRESS)
    if ray.is_initialized():
        yield Session(ray.get_runtime_context().gcs_address, None)
    elif address is not None:
        with _joined(address, name) as session:
            yield session
    else:
        with _started(num_cpus or _cpus_wanted(cluster), dashboard) as session:
            yield session


def _surrounding_cluster() -> str | None:
    """What RAY_ADDRESS says, if it is the address of a cluster; a URL in it is meant for the clients of jobs."""
    address = os.environ.get(RAY_ADDRESS, "").strip()
    return None if address in ("", "local") or address.startswith(("http://", "https://")) else address


@contextmanager
def _joined(address: str, name: str) -> Iterator[Session]:
    """Join the cluster at an address, which ``name`` gives."""
    check_ray_answers(address, name=name)
    with environment(_common_environment(), RAY_SETS), _signal_handler_kept(), _without_messages():
        try:
            with _signal_handler_kept():
                context = ray.init(address=address, **_logging())
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = " ".join(str(error).split())
            raise ClusterError(
                f"cannot join the Ray cluster {address}: {reason}. Run on one of its nodes, or send the stage "
                "there with `codec-dist submit`"
            ) from error
        try:
            yield _session(context)
        finally:
            ray.shutdown()


@contextmanager
def _started(num_cpus: int | None, dashboard: bool) -> Iterator[Session]:
    folder = _temporary_folder()
    try:
        with environment(_local_environment(), RAY_SETS), _confined(), _signal_handler_kept(), _without_messages():
            try:
                with _signal_handler_kept():
                    context = _start(num_cpus, dashboard, folder)
                session = _session(context)
                # Where jobs of this cluster look for it; they would join any that they find on this machine otherwise.
                (folder / ADDRESS_FILE).write_text(session.address, encoding="utf-8")
                yield session
            finally:
                _shut_down()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(num_cpus: int | None, dashboard: bool, folder: Path) -> "ray._private.worker.RayContext":
    for attempt in range(1, STARTS + 1):
        try:
            return ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                dashboard_port=free_port() if dashboard else None,
                **_logging(),
                _temp_dir=str(folder),
            )
        except Exception as error:
            # Ray gives its own processes 30 s, which a busy machine can exceed.
            _end_half_started(error)
            reason = " ".join(str(error).split())
            if "timed out during startup" not in reason:
                raise ClusterError(f"Ray does not start on this machine: {reason}") from error
            if attempt == STARTS:
                raise ClusterError(
                    f"Ray did not start on this machine within 30 s, {STARTS} times: is it overloaded?"
                ) from error
    raise AssertionError("unreachable")


def _logging() -> dict[str, Any]:
    """What of Ray's own text, and that of its workers, comes to the terminal: with --debug all, else nothing.

    What it means for the user is said by those who asked Ray for something.
    """
    debug = LOGGER.isEnabledFor(logging.DEBUG)
    return {"logging_level": logging.INFO if debug else logging.CRITICAL, "log_to_driver": debug}


@contextmanager
def _without_messages() -> Iterator[None]:
    """Unless --debug, keep from the terminal what Ray's nodes tell all drivers: tasks killed, nodes gone, and how to
    configure Ray. It does not pass through Ray's logging, and no option of ``ray.init`` stops it.
    """
    from ray._private import worker

    if LOGGER.isEnabledFor(logging.DEBUG) or not hasattr(worker, "print_to_stdstream"):
        yield
        return
    with _replaced(worker, "print_to_stdstream", lambda *_, **__: None):
        yield


def _common_environment() -> dict[str, str]:
    values = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # SIGTERM is Python's here; Ray's own handler would print a stack of C++ and abort the process 3 s later.
        "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    }
    if not LOGGER.isEnabledFor(logging.DEBUG):
        # Tasks whose results nobody waits for any more, after an error that is reported.
        values["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    return values


def _shut_down() -> None:
    """End Ray and, where this version of it can, wait until its processes no longer write to their folder."""
    waits = "wait_for_processes" in inspect.signature(ray.shutdown).parameters
    ray.shutdown(**({"wait_for_processes": True} if waits else {}))


def _end_half_started(error: Exception) -> None:
    """End the processes of a Ray that did not come up: only the frame that raised still knows them."""
    from ray._private.node import Node

    trace = error.__traceback__
    while trace is not None:
        node = trace.tb_frame.f_locals.get("self")
        if isinstance(node, Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            return
        trace = trace.tb_next


def _session(context: "ray._private.worker.RayContext") -> Session:
    url = context.dashboard_url
    return Session(context.address_info["gcs_address"], f"http://{url}" if url else None)


def _cpus_wanted(cluster: ClusterSection) -> int | None:
    """CPUs that a local Ray must count so that all that was asked for has room; None: as many as there are."""
    wanted = max((cluster.actors or 1) * cluster.cpus_per_actor, cluster.training_workers or 2)
    return wanted if wanted > (os.cpu_count() or 1) else None


def _local_environment() -> dict[str, str]:
    values = {
        **_common_environment(),
        # Workers of the plain kind, which nothing here uses, would slow the start of those that do the work.
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        # A job's `python` is this interpreter, also where its environment is not activated.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray asks for a token by default, and without this would write one into the home directory.
        values["RAY_AUTH_TOKEN"] = _token()
    return values


_TOKENS: list[str] = []


def _token() -> str:
    # One per process: Ray's core caches the first that it sees.
    if not _TOKENS:
        _TOKENS.append(os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32))
    return _TOKENS[0]


def _temporary_folder() -> Path:
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="codec-", dir=base))
    if len(str(folder)) > LONGEST_TEMPORARY_FOLDER and os.name == "posix":
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="codec-", dir="/tmp"))
    return folder


@contextmanager
def _confined() -> Iterator[None]:
    """Let what ``ray.init`` starts bind to 127.0.0.1, and to ports that no other Ray of this machine has.

    The first is what Ray does on macOS and Windows, governed by RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER, which it
    reads when it is imported: too early to be asked here. The second is an option of ``ray start``
    (--dashboard-agent-listen-port, 0 for any) that ``ray.init`` lacks; with a fixed port a second Ray on the
    machine takes no jobs.
    """
    from ray._private import parameter, ray_constants

    any_port = functools.partial(parameter.RayParams, dashboard_agent_listen_port=0)
    with (
        environment({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}, RAY_SETS),
        _replaced(ray_constants, "ENABLE_RAY_CLUSTER", False),
        _replaced(parameter, "RayParams", any_port),
    ):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _signal_handler_kept() -> Iterator[None]:
    """Put back the handler of SIGTERM, which Ray replaces: from Python, and below it by one that prints a stack."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # None stands for a handler that was not set from Python, which cannot be put back.
        if before is not None:
            signal.signal(signal.SIGTERM, before)


# ---- Bounded questions to addresses: does anything answer there, and is it Ray?


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def check_ray_answers(address: str, seconds: float = SECONDS_TO_ANSWER, name: str = "cluster.address") -> None:
    """Refuse an ``address`` of a Ray cluster (HOST:PORT) at which no Ray answers.

    Ray itself would wait for minutes. ``auto`` is left to Ray, which looks on this machine only.

    Args:
        address: HOST:PORT.
        seconds: how long to wait.
        name: the setting or variable that gives the address, for the message.

    Raises:
        ClusterError: not of the form HOST:PORT, nothing listens there, or it is not Ray's port.
    """
    if address == "auto":
        return
    host, port = _host_and_port(address, name)
    _check_listening(address, host, port, seconds, name)
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    if not _speaks_http2(host, port, seconds):
        raise ClusterError(
            f"{address} answers, but not as a Ray cluster: {name} takes the port of Ray's head "
            "(6379 by default), not that of its dashboard"
        )


def check_jobs_server_answers(address: str, seconds: float = SECONDS_TO_ANSWER) -> str:
    """The URL (http://HOST:PORT) of the jobs server that ``address`` names.

    Raises:
        ClusterError: not an HTTP address, or nothing there answers HTTP in time.
    """
    url = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(f"cannot submit to {address!r}: use the URL of the dashboard, such as http://HOST:8265")
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=seconds) as answer:
            known = json.loads(answer.read(LONGEST_ANSWER))
            found = "" if isinstance(known, dict) and "ray_version" in known else "it is another server"
    except urllib.error.HTTPError as error:
        # A demand for a token is one: Ray's client says what it means.
        found = "" if error.code in (401, 403) else f"HTTP {error.code}"
    except (http.client.HTTPException, UnicodeError, json.JSONDecodeError):
        found = "it speaks something else"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ClusterError(
            f"no Ray jobs server answers at {url} ({reason}): check the address and that the cluster is up"
        ) from error
    if found:
        raise ClusterError(
            f"{url} answers, but not as a Ray jobs server ({found}): jobs are sent to the port of the dashboard "
            "(8265 by default), not to that of Ray's head (6379)"
        )
    return url


def _host_and_port(address: str, name: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if "://" in address or not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise ClusterError(f"{name} is {address!r}: expected `auto` or HOST:PORT, such as 10.0.0.1:6379")
    return host.strip("[]"), int(port)


def _check_listening(address: str, host: str, port: int, seconds: float, name: str) -> None:
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error.strerror or error}): check {name} and that "
            "the head node is up"
        ) from error


def _speaks_http2(host: str, port: int, seconds: float) -> bool:
    """Whether the answer to HTTP/2's greeting (RFC 9113, 3.4) is a SETTINGS frame, as gRPC servers send it."""
    try:
        with socket.create_connection((host, port), timeout=seconds) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            return connection.recv(9)[3:4] == b"\x04"
    except OSError:
        return False
