"""The wheel is complete: installed alone, in a directory with spaces, it serves the demo from another directory."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import handler

ROOT = Path(__file__).resolve().parents[2]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def run(*command, **options):
    finished = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, **options)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy of the files that belong to a source distribution."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.cfg", "handler"):
        run("cp", "-r", ROOT / name, source)
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", target, source)
    (path,) = target.iterdir()
    return path


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
    assert wheel.name.startswith(f"vivit_torchserve-{handler.__version__}-py3-none-any")
    package = ROOT / "handler"
    files = {path.relative_to(ROOT) for path in package.rglob("*") if path.is_file()}
    ignored = {path for path in files if "__pycache__" in path.parts or path.name == "README.md"}
    assert {Path(name) for name in packed} - ignored == files - ignored
    for name in (
        "labels/kinetics400.txt",
        "inference.proto",
        "metrics.yaml",
        "config.properties",
        "demo/clips/still.mkv",
    ):
        assert f"handler/assets/{name}" in packed
    assert "handler/py.typed" in packed


def test_installed_wheel_serves_demo(wheel, tmp_path):
    site, elsewhere = tmp_path / "site packages", tmp_path / "some where"
    elsewhere.mkdir()
    run(*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel)
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_STATE_HOME": str(tmp_path / "my state")}
    printed = run(
        *(sys.executable, "-m", "handler.cli", "demo", "--once", "--port", "0"), cwd=elsewhere, env=environment
    )
    assert "18 of 18 answers are right." in printed
    assert (tmp_path / "my state" / "vivit" / "demo" / "key_file.json").is_file()
    where = run(sys.executable, "-c", "import handler; print(handler.__file__)", cwd=elsewhere, env=environment)
    assert where.startswith(str(site))
    assert not list(elsewhere.iterdir())
