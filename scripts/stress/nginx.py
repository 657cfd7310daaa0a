"""Starts nginx with scripts/deployment/nginx.conf in front of a server, for the tests and scripts/stress/proxy.py."""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from handler.cli.ports import find_free_ports

CONFIG = Path(__file__).resolve().parents[1] / "deployment" / "nginx.conf"
# Debian installs nginx where only root's PATH leads.
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")
START_TIMEOUT_S = 10


@dataclass(frozen=True)
class Proxy:
    """A running nginx.

    Attributes:
        url: its address.
        certificate: of its TLS, self-signed.
        pid: of its main process.
    """

    url: str
    certificate: Path
    pid: int

    def connect(self, *, timeout_s: float = 60) -> ssl.SSLSocket:
        """Opens a TLS connection."""
        address = urlsplit(self.url)
        context = ssl.create_default_context(cafile=str(self.certificate))
        connection = socket.create_connection((address.hostname or "", address.port or 0), timeout=timeout_s)
        return context.wrap_socket(connection, server_hostname=address.hostname)


@contextlib.contextmanager
def running_proxy(upstream: str, *, directory: Path, changes: Mapping[str, str] | None = None) -> Iterator[Proxy]:
    """Runs nginx with the shipped configuration until the context ends.

    Args:
        upstream: address of the server behind it, e.g. `http://127.0.0.1:8080`.
        directory: for its certificate, logs and temporary files.
        changes: texts in the configuration, and what replaces them.

    Raises:
        ValueError: the configuration does not contain a text of `changes`.
        RuntimeError: nginx does not start.
    """
    assert NGINX is not None, "nginx is not installed"
    (port,) = find_free_ports(1)
    directory.mkdir(parents=True, exist_ok=True)
    certificate = make_certificate(directory)
    temporary = "".join(
        f"    {kind}_temp_path {directory / kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = replace_each(
        CONFIG.read_text(),
        {
            "http {\n": f"http {{\n{temporary}",
            "listen 443 ": f"listen 127.0.0.1:{port} ",
            "server 127.0.0.1:8080 ": f"server {urlsplit(upstream).netloc} ",
            "/etc/nginx/tls/": f"{directory}/",
            "/var/log/nginx/": f"{directory}/",
            **(changes or {}),
        },
    )
    config, log = directory / "nginx.conf", directory / "error.log"
    config.write_text(text)
    settings = f"daemon off; pid {directory / 'nginx.pid'}; error_log {log};"
    if os.geteuid() == 0:
        settings += " user root;"  # other users cannot read the temporary directories of tests
    process = subprocess.Popen(
        [NGINX, "-p", directory, "-e", log, "-c", config, "-g", settings], stderr=subprocess.DEVNULL
    )
    try:
        _wait_for_port(port, process, log)
        yield Proxy(url=f"https://127.0.0.1:{port}", certificate=certificate, pid=process.pid)
    finally:
        process.terminate()
        process.wait()


def make_certificate(directory: Path) -> Path:
    """Writes certificate.pem, self-signed for 127.0.0.1, and key.pem; returns the path of the first."""
    certificate = directory / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        + ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
        + ["-keyout", directory / "key.pem", "-out", certificate],
        check=True,
        capture_output=True,
    )
    return certificate


def replace_each(text: str, changes: Mapping[str, str]) -> str:
    """Replaces texts. All of them must occur."""
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"{CONFIG.name} does not contain {old!r}")
        text = text.replace(old, new)
    return text


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    process.kill()
    raise RuntimeError(f"nginx does not start: {log.read_text() if log.exists() else ''}")
