"""Starts, monitors and stops a TorchServe process: for `vivit serve`, the tests and the benchmarks.

with Server(config=SERVER_CONFIG, model_store=Path("model_store"), directory=directory) as server:
    server.wait_until_ready("vivit")
    requests.post(f"{server.inference_url}/predictions/vivit", headers=server.headers("inference"), ...)
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

import psutil
import requests

from handler.assets import METRICS
from handler.cli.command import CommandError
from handler.cli.java import find_java_home
from handler.cli.keys import KEY_FILE
from handler.cli.ports import describe_listener, is_port_free
from handler.cli.properties import PORT_KEYS, read_properties, write_properties

LOCK_FILE = "server.lock"
REQUIRED_KEYS = (*PORT_KEYS, "metrics_config")
REQUEST_TIMEOUT_S = 5
POLL_INTERVAL_S = 0.2
HEALTH_INTERVAL_S = 10
TERMINATION_TIMEOUT_S = 10


class ServerError(CommandError):
    """TorchServe cannot be started, or a model cannot be loaded."""


class Server:
    """A TorchServe process and its workers, from `start` to `stop`; also a context manager.

    Args:
        config: a config.properties file, or its entries.
        model_store: the directory of the archives.
        directory: working directory of the server, which writes key_file.json, console.log and logs/ there. It is
            created if it does not exist. Only one server can use it at the same time.
        arguments: further arguments of torchserve, e.g. `["--models", "all", "--enable-model-api"]`.
        keeps_snapshots: whether TorchServe writes its models and workers to logs/config/*.cfg at every change and when
            it stops. A server with the newest of these files as its `config` starts with the same models and workers.

    Attributes:
        inference_url: address of the inference API, e.g. `http://127.0.0.1:8080`.
        management_url: address of the management API.
        metrics_url: address of the metrics.
        grpc_inference: host and port of the gRPC inference API.
        grpc_management: host and port of the gRPC management API.
        temporary: directory for temporary files of the running server and its workers; None if it does not run.

    Raises:
        ServerError: the configuration lacks an address.
    """

    def __init__(
        self,
        *,
        config: Path | Mapping[str, str],
        model_store: Path,
        directory: Path,
        arguments: Sequence[str] = (),
        keeps_snapshots: bool = False,
    ):
        self.model_store = Path(model_store).resolve()
        self.directory = Path(directory).resolve()
        self.arguments = list(arguments) if keeps_snapshots else ["--ncs", *arguments]
        self.properties = dict(config) if isinstance(config, Mapping) else read_properties(Path(config))
        if missing := [key for key in REQUIRED_KEYS if key not in self.properties]:
            source = "the configuration" if isinstance(config, Mapping) else config
            raise ServerError(f"{source} must set {', '.join(missing)}")
        self.inference_url = self.properties["inference_address"]
        self.management_url = self.properties["management_address"]
        self.metrics_url = self.properties["metrics_address"]
        self.grpc_inference = f"127.0.0.1:{self.properties['grpc_inference_port']}"
        self.grpc_management = f"127.0.0.1:{self.properties['grpc_management_port']}"
        self.temporary: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def process(self) -> psutil.Process:
        """The Java process; its children are the workers."""
        return psutil.Process(self._launcher.pid).children()[0]

    @property
    def key_file(self) -> Path:
        """The file with the tokens."""
        return self.directory / KEY_FILE

    @property
    def log_file(self) -> Path:
        """The file with the output of the server and its workers."""
        return self.directory / "console.log"

    def workers(self) -> list[psutil.Process]:
        """The worker processes of all models."""
        return self.process.children()

    def decoders(self) -> list[psutil.Process]:
        """The decoder processes of all workers."""
        return [decoder for worker in self.workers() for decoder in worker.children()]

    def headers(self, kind: str) -> dict[str, str]:
        """Returns the authorization header for a kind of call, or none if the server requires no token.

        Args:
            kind: "inference" or "management".
        """
        token = self.token(kind)
        return {"Authorization": f"Bearer {token}"} if token else {}

    def token(self, kind: str) -> str | None:
        """Returns the token for a kind of call, or None if the server requires none or has not written it yet."""
        if self.properties.get("disable_token_authorization") == "true":
            return None
        try:
            token: str = json.loads(self.key_file.read_text())[kind]["key"]
        except (FileNotFoundError, ValueError):  # not written, or only in part
            return None
        return token

    def start(self, *, timeout_s: float = 120) -> None:
        """Starts the server and waits until it answers.

        Raises:
            CommandError: no Java, a port or the directory is in use, torchserve exits, or no answer in time.
        """
        java_home = find_java_home()
        self._check_ports()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = self._lock_directory()
        try:
            self._launch(java_home)
            self._wait_for(lambda: self._ping() == HTTPStatus.OK, what="answer from TorchServe", timeout_s=timeout_s)
        except BaseException:
            self.stop()
            raise

    def wait_until_ready(self, model: str, *, timeout_s: float = 300) -> None:
        """Waits until every worker of the model's default version is ready.

        Raises:
            ServerError: the model is not loaded, a worker failed to load it, or no worker is ready in time. The message
                contains the end of the log.
        """
        self._wait_for(lambda: self._model_is_ready(model), what=f"ready worker of {model}", timeout_s=timeout_s)

    def wait(self, *, max_unhealthy_s: float = math.inf) -> NoReturn:
        """Waits until TorchServe exits, is unhealthy for too long, or an exception such as KeyboardInterrupt is raised.

        TorchServe exits by itself when it has lost all workers. It is unhealthy if `/ping` fails, because TorchServe
        has given up starting a worker, or is not answered.

        Args:
            max_unhealthy_s: seconds that the server may be unhealthy.

        Raises:
            ServerError: TorchServe has exited, or has been unhealthy for longer than `max_unhealthy_s`.
        """
        last_healthy_s = next_check_s = time.monotonic()
        # Polls: a signal just before signal.pause() or Popen.wait() would be noticed only after that returns.
        while self._launcher.poll() is None:
            if time.monotonic() >= next_check_s:
                if self._ping() < HTTPStatus.INTERNAL_SERVER_ERROR:
                    last_healthy_s = time.monotonic()
                elif time.monotonic() - last_healthy_s > max_unhealthy_s:
                    raise ServerError(
                        f"TorchServe has been unhealthy for more than {max_unhealthy_s:.0f} s; the end of its log:\n"
                        f"{self.log_tail()}"
                    )
                next_check_s = time.monotonic() + HEALTH_INTERVAL_S
            time.sleep(POLL_INTERVAL_S)
        raise ServerError(f"TorchServe has exited; the end of its log:\n{self.log_tail()}")

    def stop(self) -> None:
        """Stops the server and its workers and deletes their temporary directory."""
        if self._process is not None:
            processes = []
            with contextlib.suppress(psutil.NoSuchProcess):
                launcher = psutil.Process(self._process.pid)
                processes = [*launcher.children(recursive=True), launcher]
            _terminate(processes)
            self._process.wait()
            self._process = None
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def log_tail(self, lines: int = 30) -> str:
        """Returns the last lines of the log, without accesses and metrics."""
        text = self.log_file.read_text(errors="replace")
        kept = [line for line in text.splitlines() if "ACCESS_LOG" not in line and "METRICS" not in line]
        return "\n".join(kept[-lines:])

    @property
    def _launcher(self) -> subprocess.Popen[bytes]:
        """The Python process that started Java and waits for it."""
        if self._process is None:
            raise ServerError("the server does not run")
        return self._process

    def _check_ports(self) -> None:
        for key in PORT_KEYS:
            port = int(self.properties[key].rsplit(":", 1)[-1])
            if not is_port_free(port):
                user = describe_listener(port)
                raise ServerError(f"port {port} ({key} in config.properties) is taken by {user}, or change the port")

    def _lock_directory(self) -> int:
        """Locks the directory until the returned file descriptor is closed, at the latest when this process exits."""
        lock = os.open(self.directory / LOCK_FILE, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise ServerError(f"another server uses {self.directory}: stop it, or use another directory") from error
        return lock

    def _launch(self, java_home: str) -> None:
        # TorchServe resolves relative paths against its working directory.
        properties = {**self.properties, "metrics_config": str(METRICS)}
        config = write_properties(self.directory / "config.properties", properties)
        self.key_file.unlink(missing_ok=True)
        # TorchServe keeps its pid file and its workers' sockets in the temporary directory: one server per directory.
        # The path must be short, because that of a Unix socket is limited to 107 characters.
        self.temporary = tempfile.mkdtemp(prefix="ts-")
        environment = {
            **os.environ,
            "JAVA_HOME": java_home,
            "TMPDIR": self.temporary,
            "TEMP": self.temporary,
            "TS_CONFIG_FILE": str(config),  # takes precedence over --ts-config
            "LOG_LOCATION": str(self.directory / "logs"),
            "METRICS_LOCATION": str(self.directory / "logs"),
            # Workers run `python`: this one, not the first on the PATH.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        command = [sys.executable, "-m", "ts.model_server", "--start", "--foreground"]
        with open(self.log_file, "wb") as console:
            self._process = subprocess.Popen(
                [*command, "--model-store", str(self.model_store), *self.arguments],
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _ping(self) -> int:
        """Returns the status of `/ping`, which is 400 if the inference key has expired, or 503 if nothing answers."""
        try:
            answer = requests.get(
                f"{self.inference_url}/ping", headers=self.headers("inference"), timeout=REQUEST_TIMEOUT_S
            )
        except requests.RequestException:
            return HTTPStatus.SERVICE_UNAVAILABLE
        return answer.status_code

    def _model_is_ready(self, model: str) -> bool:
        try:
            answer = requests.get(
                f"{self.management_url}/models/{model}", headers=self.headers("management"), timeout=REQUEST_TIMEOUT_S
            )
        except requests.RequestException:
            return False
        if answer.status_code == requests.codes.not_found:
            # TorchServe registers the models of `load_models` before it answers; it skips an archive that is missing.
            raise ServerError(
                f"TorchServe has no model {model!r}: check that its archive is in {self.model_store} and named in "
                f"`load_models`. The end of the log:\n{self.log_tail()}"
            )
        if not answer.ok:
            return False
        # TorchServe restarts such a worker again and again, with the same result.
        if "Load model failed" in self.log_tail(200):
            raise ServerError(f"a worker of {model} failed to load; the end of its log:\n{self.log_tail()}")
        description = answer.json()[0]
        ready = sum(worker["status"] == "READY" for worker in description["workers"])
        return bool(ready >= max(1, description["minWorkers"]))

    def _wait_for(self, condition: Callable[[], bool], *, what: str, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if self._launcher.poll() is not None:
                raise ServerError(f"TorchServe exited during its start; the end of its log:\n{self.log_tail()}")
            if time.monotonic() > deadline_s:
                raise ServerError(f"no {what} within {timeout_s:.0f} s; the end of the log:\n{self.log_tail()}")
            time.sleep(POLL_INTERVAL_S)


def exit_on_sigterm_or_sighup() -> None:
    """Turns SIGTERM and SIGHUP (the terminal was closed) into SystemExit.

    `with Server` then stops the server, which runs in its own session and gets no signals from the terminal.
    """
    # nohup ignores SIGHUP, and so must we.
    handled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]

    def leave(number: int, _: FrameType | None) -> None:
        # A closing terminal may send SIGHUP twice, from the shell and the kernel: ignore the second while stopping.
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in handled:
        signal.signal(number, leave)


def _terminate(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=TERMINATION_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=TERMINATION_TIMEOUT_S)
