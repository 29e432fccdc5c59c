"""Bounded questions to addresses: does anything answer there, and is it Ray?"""

import http.client
import json
import os
import socket
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from codec_dist.cluster_runtime.errors import ClusterError

SECONDS_TO_ANSWER = 10.0
LONGEST_ANSWER = 1 << 16


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
