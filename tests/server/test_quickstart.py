"""`vivit demo` and `vivit serve` from start to stop: the printed commands work, and the servers stop cleanly."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
from pathlib import Path

import psutil
import pytest

from handler.assets import DEMO_CHECKPOINT, DEMO_CLIPS, SERVER_CONFIG
from handler.cli.build import build_archive
from handler.cli.ports import describe_listener
from handler.cli.properties import on_free_ports, read_properties, write_properties
from handler.cli.server import Server, ServerError

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60


def vivit(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "handler.cli", *map(str, arguments)],
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def shell(command, **options):
    return subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, **options)


def read_until_ready(stream):
    lines = []
    for line in stream:
        lines.append(line.rstrip("\r\n"))
        if "Ctrl-C stops" in line:
            return lines
    raise AssertionError("\n".join(lines))


def line_with(lines, text):
    """The first line with a text, without the spaces around it."""
    return next(line.strip() for line in lines if text in line)


@contextlib.contextmanager
def stopped_afterwards(process):
    """Kills the program and its server if a test fails before it stops them itself."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=STOP_TIMEOUT_S)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The shipped configuration on free ports."""
    properties = on_free_ports(read_properties(SERVER_CONFIG))
    config = write_properties(tmp_path_factory.mktemp("config") / "config.properties", properties)
    return {**os.environ, "TS_CONFIG_FILE": str(config)}


def test_demo_in_a_terminal(environment, tmp_path):
    directory = tmp_path / "the server"
    ours, its = pty.openpty()
    process = vivit(
        "demo",
        "--directory",
        directory,
        env=environment,
        stdin=its,
        stdout=its,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # the controlling terminal: its end causes SIGHUP
    )
    os.close(its)
    with stopped_afterwards(process):
        with open(ours) as terminal:
            lines = read_until_ready(terminal)
            clips = sorted(DEMO_CLIPS.iterdir())
            for clip in clips:
                label = clip.stem.replace("-", " ")
                assert re.fullmatch(rf"{clip.name} +({label} [\d.]+% *){{2}}correct", line_with(lines, clip.name))
            assert f"{2 * len(clips)} of {2 * len(clips)} answers are right." in lines
            labels = json.loads((DEMO_CHECKPOINT / "config.json").read_text())["id2label"].values()
            text = " ".join(lines)
            assert f"recognizes 9 motions: {', '.join(labels)}." in text and "whatever a video shows" in text

            answer = shell(f"{line_with(lines, 'curl')} --silent")
            assert answer.stdout.count('"label"') == 3, answer
            classify = line_with(lines, " classify ").replace("YOUR_VIDEO.mp4", str(clips[0]))
            assert "growing" in shell(classify, cwd=tmp_path).stdout

            attached = Server(config=directory / "config.properties", model_store=tmp_path, directory=directory)
            assert line_with(lines, "key ").split()[1] == attached.token("inference")
            with pytest.raises(ServerError, match="TorchServe has no model 'missing'"):
                attached.wait_until_ready("missing")
            with pytest.raises(ServerError, match=r"is taken by a TorchServe \(java, pid \d+\).*or change the port"):
                attached.start()
            on_other_ports = Server(
                config=on_free_ports(attached.properties), model_store=tmp_path, directory=directory
            )
            with pytest.raises(ServerError, match="another server uses"):
                on_other_ports.start()

            family = psutil.Process(process.pid).children(recursive=True)
            port = int(attached.inference_url.rsplit(":", 1)[1])
            assert int(re.search(r"kill (\d+)", describe_listener(port))[1]) in [member.pid for member in family]
        # The terminal is closed here.
        assert process.wait(timeout=STOP_TIMEOUT_S) == 128 + signal.SIGHUP
        assert len(family) >= 3 and not any(member.is_running() for member in family)


def test_archive_served_until_interrupt(tmp_path):
    store = tmp_path / "my archives"
    build_archive(checkpoint=str(DEMO_CHECKPOINT), name="motions", version="2.0", export_path=store)
    with stopped_afterwards(
        vivit(
            "serve",
            store / "motions.mar",
            *("--name", "other", "--port", "0", "--workers", "1", "--enable-model-api"),
            *("--directory", tmp_path / "state"),
        )
    ) as process:
        lines = read_until_ready(process.stdout)
        assert "other 2.0 is ready." in lines
        assert "/predictions/other" in line_with(lines, "REST")
        classify = line_with(lines, " classify ").replace("YOUR_VIDEO.mp4", str(DEMO_CLIPS / "still.mkv"))
        assert "still" in shell(classify, cwd=tmp_path).stdout
        properties = read_properties(tmp_path / "state" / "config.properties")
        settings = json.loads(properties["models"])["other"]["2.0"]
        assert (settings["minWorkers"], settings["batchSize"]) == (1, 8)
        assert properties["enable_model_api"] == "true"
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=STOP_TIMEOUT_S)
    assert process.returncode == 0
    assert "stopping TorchServe" in errors and "Traceback" not in errors
    assert len(family) >= 3 and not any(member.is_running() for member in family)


def test_port_in_use_reported(environment, tmp_path):
    store = tmp_path / "store"
    build_archive(checkpoint=str(DEMO_CHECKPOINT), name="m", version="1.0", export_path=store)
    address = read_properties(Path(environment["TS_CONFIG_FILE"]))["inference_address"]
    port = int(address.rsplit(":", 1)[1])
    with socket.create_server(("127.0.0.1", port)):
        process = vivit("serve", store / "m.mar", "--directory", tmp_path, env=environment)
        _, errors = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 1
    assert f"port {port} (inference_address in config.properties) is taken" in errors
    assert "Traceback" not in errors
