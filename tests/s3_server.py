"""A real server that speaks the S3 API, on this machine, and a proxy before it that can be made busy."""

import http.client
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

BUCKET = "bucket"
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
# In the words of MinIO.
STORAGE_FULL = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>XMinioStorageFull</Code>'
    b"<Message>Storage backend has reached its minimum free drive threshold.</Message></Error>"
)


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a server; answers 503 to the next ``busy`` of them, and to each ``busy_every``-th."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = (host, port)
        self.busy = self.busy_every = 0
        self.full = False
        self.refused = 0
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def admits(self, method: str, path: str) -> bool:
        """Whether a request is passed on."""
        with self.lock:
            self.requests.append((method, path))
            refuses = self.busy > 0 or (self.busy_every > 0 and len(self.requests) % self.busy_every == 0)
            self.busy -= self.busy > 0
            self.refused += refuses
            return not refuses


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.server.admits(self.command, self.path):
            self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
            return
        if self.server.full and self.command == "PUT":
            self._answer(507, {"Content-Type": "application/xml"}, STORAGE_FULL)
            return
        connection = http.client.HTTPConnection(*self.server.upstream)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        left_out = ("connection", "transfer-encoding", "content-length", "date", "server")
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in left_out}
        if self.command == "HEAD":
            headers["Content-Length"] = answer.getheader("Content-Length") or "0"
        self._answer(answer.status, headers, content)

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Quietly."""


for method in ("GET", "PUT", "POST", "DELETE", "HEAD"):
    setattr(_Handler, f"do_{method}", _Handler._pass_on)


@contextmanager
def serving() -> Iterator[Proxy]:
    """An empty bucket behind a proxy, both stopped at the end.

    The server's buckets belong to the process, so a server that starts later finds those of an earlier one.
    """
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(*server.get_host_and_port())
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{BUCKET}")):
            connection = http.client.HTTPConnection(*proxy.upstream)
            connection.request(method, path)
            assert connection.getresponse().status == 200
            connection.close()
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()


@contextmanager
def reachable() -> Iterator[Proxy]:
    """The same, found by this process and those that it starts: address and credentials are in the environment."""
    import s3fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with serving() as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()
