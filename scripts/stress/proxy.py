"""Attacks a server directly and through nginx with scripts/deployment/nginx.conf, and measures both.

    scripts/proxy_attacks.py
    scripts/proxy_attacks.py --attacks pipelined --heap 2g --seconds 60

Each attack comes from one address and lasts for --seconds, against a server with the demo model that has just started.
At the same time a client with another address sends good requests, one after the other. The table shows whether the
server still answers at the end, the resident memory of TorchServe's Java process, and how long the good requests took.

    none        no attack
    pipelined   40,000 requests without a key, 1.2 MB, on one connection, whose answers are not read
    slow        64 uploads of 100 MB with a key, which stop after 10 MB and continue with a byte per second
    idle        500 connections on which nothing is sent
    abandoned   200 requests with a key, whose clients disconnect as soon as they have sent them
"""

import argparse
import contextlib
import os
import socket
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import requests
from tables import format_table

from handler.assets import DEMO_CLIPS
from handler.cli.client import classify_rest
from handler.cli.server import Server, exit_on_sigterm_or_sighup
from stress.nginx import NGINX, running_proxy
from stress.server import MODEL, demo_server

ATTACKER_ADDRESS = "127.0.0.2"  # limits count per address
GOOD_REQUEST_INTERVAL_S = 0.5
GOOD_REQUEST_TIMEOUT_S = 30
ALIVE_TIMEOUT_S = 15
SEND_TIMEOUT_S = 5
COLUMNS = [
    ("attack", "{attack}"),
    ("route", "{route}"),
    ("alive", "{alive}"),
    ("MB before", "{before_mb:.0f}"),
    ("MB at most", "{largest_mb:.0f}"),
    ("MB after", "{after_mb:.0f}"),
    ("good answers", "{answered}"),
    ("failed", "{failed}"),
    ("median s", "{median_s:.2f}"),
    ("longest s", "{longest_s:.2f}"),
]
PIPELINED_REQUEST, PIPELINED_REQUESTS = b"OPTIONS / HTTP/1.1\r\nHost: a\r\n\r\n", 40_000
SLOW_UPLOADS, SLOW_UPLOAD_BYTES, SLOW_UPLOAD_START_BYTES = 64, 100_000_000, 10_000_000
IDLE_CONNECTIONS = 500
ABANDONED_REQUESTS = 200


@dataclass(frozen=True)
class Target:
    """Where an attack connects to.

    Attributes:
        url: of TorchServe or of the proxy.
        key: the inference key.
        certificate: of the proxy; None without TLS.
    """

    url: str
    key: str
    certificate: Path | None

    def connect(self) -> socket.socket:
        """Opens a connection from the attacker's address."""
        address = urlsplit(self.url)
        host, port = address.hostname or "", address.port or 0
        connection = socket.create_connection(
            (host, port), timeout=SEND_TIMEOUT_S, source_address=(ATTACKER_ADDRESS, 0)
        )
        if self.certificate is None:
            return connection
        return ssl.create_default_context(cafile=str(self.certificate)).wrap_socket(connection, server_hostname=host)

    def upload_header(self, size: int) -> bytes:
        """The header of an upload with the key."""
        return (
            f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Length: {size}\r\n\r\n"
        ).encode()


@dataclass
class Result:
    """What was measured during an attack.

    Attributes:
        is_alive: Whether the server answered at the end.
        rss_bytes: Resident memory of the Java process: before, largest, at the end.
        latencies_s: Of good requests that were answered.
        failures: Number of good requests that were not.
    """

    is_alive: bool = False
    rss_bytes: list[int] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    failures: int = 0


@contextlib.contextmanager
def no_attack(target: Target, video: bytes) -> Iterator[None]:
    """Does nothing."""
    yield


@contextlib.contextmanager
def pipelined(target: Target, video: bytes) -> Iterator[None]:
    """Sends many requests without a key on one connection and reads no answer."""
    with (
        target.connect() as connection,
        _in_background(lambda: connection.sendall(PIPELINED_REQUEST * PIPELINED_REQUESTS)),
    ):
        yield


@contextlib.contextmanager
def slow(target: Target, video: bytes) -> Iterator[None]:
    """Starts large uploads and continues them very slowly."""
    is_over = threading.Event()

    def upload() -> None:
        with target.connect() as connection:
            connection.sendall(target.upload_header(SLOW_UPLOAD_BYTES) + bytes(SLOW_UPLOAD_START_BYTES))
            while not is_over.wait(1):
                connection.sendall(b"\0")

    with contextlib.ExitStack() as stack:
        for _ in range(SLOW_UPLOADS):
            stack.enter_context(_in_background(upload))
        stack.callback(is_over.set)
        yield


@contextlib.contextmanager
def idle(target: Target, video: bytes) -> Iterator[None]:
    """Opens connections and sends nothing."""
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE_CONNECTIONS):
            stack.enter_context(target.connect())
        yield


@contextlib.contextmanager
def abandoned(target: Target, video: bytes) -> Iterator[None]:
    """Sends requests and disconnects without waiting for answers."""
    for _ in range(ABANDONED_REQUESTS):
        with contextlib.suppress(OSError), target.connect() as connection:
            connection.sendall(target.upload_header(len(video)) + video)
    yield


Attack = Callable[[Target, bytes], contextlib.AbstractContextManager[None]]
ATTACKS: dict[str, Attack] = {
    "none": no_attack,
    "pipelined": pipelined,
    "slow": slow,
    "idle": idle,
    "abandoned": abandoned,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, sys.argv by default. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="default: all")
    parser.add_argument("--heap", default="1g", metavar="SIZE", help="of Java, as for -Xmx (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, metavar="S", help="of an attack (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if NGINX is None:
        print("nginx is not installed", file=sys.stderr)
        return 1
    exit_on_sigterm_or_sighup()
    rows = []
    for name in arguments.attacks:
        for through_proxy in (False, True):
            result = measure(ATTACKS[name], through_proxy=through_proxy, heap=arguments.heap, seconds=arguments.seconds)
            rows.append({"attack": name, "route": "nginx" if through_proxy else "direct", **summary(result)})
            print(*rows[-1].values(), file=sys.stderr, flush=True)
    print(format_table(COLUMNS, rows))
    return 0


def measure(attack: Attack, *, through_proxy: bool, heap: str, seconds: float) -> Result:
    """Starts a server, attacks it and sends good requests to it."""
    with demo_server({"vmargs": f"-Xmx{heap}"}) as server, contextlib.ExitStack() as stack:
        key = server.token("inference") or ""
        target = Target(url=server.inference_url, key=key, certificate=None)
        if through_proxy:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vivit-proxy-"))
            proxy = stack.enter_context(running_proxy(server.inference_url, directory=Path(folder)))
            target = Target(url=proxy.url, key=key, certificate=proxy.certificate)
            os.environ["REQUESTS_CA_BUNDLE"] = str(proxy.certificate)
        video = sorted(DEMO_CLIPS.iterdir())[0].read_bytes()
        ask = {"url": target.url, "model": MODEL, "token": key, "timeout_s": GOOD_REQUEST_TIMEOUT_S}
        for _ in range(10):
            classify_rest(video, **ask)
        return _measure(server, attack(target, video), lambda: classify_rest(video, **ask), seconds=seconds)


def _measure(
    server: Server, attack: contextlib.AbstractContextManager[None], classify: Callable[[], Any], *, seconds: float
) -> Result:
    java = server.process
    result = Result(rss_bytes=[_rss(java)] * 2)
    end_s = time.monotonic() + seconds
    with attack:
        while time.monotonic() < end_s:
            start_s = time.monotonic()
            answer = classify()
            if answer.error is None:
                result.latencies_s.append(time.monotonic() - start_s)
            else:
                result.failures += 1
            result.rss_bytes[1] = max(result.rss_bytes[1], _rss(java))
            time.sleep(GOOD_REQUEST_INTERVAL_S)
    result.rss_bytes.append(_rss(java))
    with contextlib.suppress(requests.RequestException):
        answer = requests.get(
            f"{server.inference_url}/ping", headers=server.headers("inference"), timeout=ALIVE_TIMEOUT_S
        )
        result.is_alive = answer.ok
    return result


def summary(result: Result) -> dict[str, Any]:
    """Returns the values of a row of the table."""
    before, largest, after = result.rss_bytes
    return {
        "alive": "yes" if result.is_alive else "no",
        "before_mb": before / 1e6,
        "largest_mb": largest / 1e6,
        "after_mb": after / 1e6,
        "answered": len(result.latencies_s),
        "failed": result.failures,
        "median_s": statistics.median(result.latencies_s) if result.latencies_s else None,
        "longest_s": max(result.latencies_s, default=None),
    }


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


@contextlib.contextmanager
def _in_background(action: Callable[[], None]) -> Iterator[None]:
    """Runs an action in a thread, which ends with it or when the server closes its connection."""

    def run() -> None:
        with contextlib.suppress(OSError):
            action()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
