"""Servers for tests, each on a free port of this machine: two of S3, a faulty one, a web server."""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import socket
import threading
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from with_s3 import BUCKET, S3Server, moto_server, seaweedfs_server

__all__ = ["BUCKET", "faulty_s3", "moto", "seaweedfs", "web"]


@pytest.fixture(scope="session")
def moto(tmp_path_factory):
    """A server of S3 in memory."""
    with moto_server(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory):
    """A real server of S3."""
    with seaweedfs_server(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


# ------------------------------------------------------------------------------- a faulty S3 server


@dataclass
class Fault:
    """What happens to requests of a method whose path and query contain a text.

    Attributes:
        kind: ``refuse`` (answer `status`, don't pass it on), ``reset`` (hang up at once), ``lose``
            (pass it on, and hang up before the answer), ``truncate`` (hang up in the middle of the
            body), ``short`` (send a shorter body, as if that were all), ``whole`` (ignore the range
            that is asked for), ``elsewhere`` (send another range).
        times: How many requests it happens to.
        after: How many pass before.
    """

    kind: str
    method: str
    text: str = ""
    times: int = 1
    after: int = 0
    status: int = 503
    code: str = "SlowDown"


@dataclass
class FaultyProxy:
    """A proxy in front of an S3 server, and what it was asked."""

    server: S3Server
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    gone: threading.Event = field(default_factory=threading.Event)

    def go(self):
        """Answer nobody any more: neither on new connections nor on those that there are."""
        self.gone.set()
        self.listener.shutdown()
        self.listener.server_close()

    def options(self, **more):
        """Make storage options for the server, by way of the proxy."""
        return self.server.options(**{"endpoint_url": self.endpoint} | more)

    def fault(self, *args, **kwargs):
        """Let something go wrong from now on."""
        self.faults.append(Fault(*args, **kwargs))

    def take(self, method, path):
        """Note a request, and return the fault that happens to it, or None."""
        with self.lock:
            self.requests.append((method, path))
            if self.gone.is_set():
                return Fault("reset", method)
            for fault in self.faults:
                if method == fault.method and fault.text in path and fault.times:
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def count(self, method, text=""):
        """Count the requests of a method whose path and query contain a text."""
        with self.lock:
            return sum(one == method and text in path for one, path in self.requests)


class _ProxyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = proxy.take(self.command, urllib.parse.unquote(self.path))
        kind = fault.kind if fault else None
        if kind == "reset":
            self.hang_up()
            return
        if kind == "refuse":
            text = f"<Error><Code>{fault.code}</Code><Message>no</Message></Error>"
            self.answer(fault.status, {"Content-Type": "application/xml"}, text.encode())
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        if kind == "whole":
            del headers["range"]
        if kind == "elsewhere":
            headers["range"] = "bytes=1-" + headers["range"].rpartition("-")[2]
        target = urllib.parse.urlsplit(proxy.server.endpoint)
        connection = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if kind == "lose":
            self.hang_up()
            return
        headers = dict(response.headers.items())
        if kind == "short":
            data = data[: len(data) // 2]
        self.answer(response.status, headers, data, cut=kind == "truncate")

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815  as the base class wants them

    def answer(self, status, headers, data, *, cut=False):
        self.send_response_only(status)
        left_out = {"connection", "transfer-encoding", "content-length"}
        if self.command == "HEAD":
            left_out.remove("content-length")
        for name, value in headers.items():
            if name.lower() not in left_out:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.hang_up()

    def hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        pass


class _QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # clients hang up, too


@contextlib.contextmanager
def _serving(handler):
    with _QuietServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def faulty_s3(moto):
    """An S3 server with faults that a test chooses."""
    proxy = FaultyProxy(moto)
    with _serving(_ProxyHandler) as (server, endpoint):
        server.proxy, proxy.listener, proxy.endpoint = proxy, server, endpoint
        yield proxy


# ------------------------------------------------------------------------------------- a web server


class _RangesHandler(http.server.SimpleHTTPRequestHandler):
    """Python's web server, which knows no ranges; and, if told to, with them."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args, ranges, **kwargs):
        self.ranges = ranges
        super().__init__(*args, **kwargs)

    def send_head(self):
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range")
        if not (self.ranges and wanted and path.is_file()):
            return super().send_head()
        size = path.stat().st_size
        start, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(start), min(int(last) + 1, size)
        if start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        file = path.open("rb")
        file.seek(start)
        self.left = stop - start
        return file

    def copyfile(self, source, outputfile):
        left = getattr(self, "left", None)
        outputfile.write(source.read() if left is None else source.read(left))

    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path):
    """A function that serves a folder: `web(folder, ranges=True)` returns its URL."""
    with contextlib.ExitStack() as stack:

        def serve(folder, *, ranges):
            handler = functools.partial(_RangesHandler, directory=str(folder), ranges=ranges)
            return stack.enter_context(_serving(handler))[1]

        yield serve
