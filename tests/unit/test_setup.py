"""Scripts of a checkout: what scripts/setup installs, and wrappers that run without an activated environment."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import _requirements
import pytest
from packaging.requirements import Requirement

import handler
from handler.cli import build, classify, convert

SCRIPTS = _requirements.ROOT / "scripts"


@pytest.fixture
def installed(monkeypatch):
    """An environment in which everything of `test` has the pinned version; tests change it."""
    pins = {}
    for line in _requirements.lines((SCRIPTS / "constraints.txt").read_text()):
        requirement = Requirement(line)
        pins[requirement.name.lower()] = str(requirement.specifier).removeprefix("==")
    packages = {name: SimpleNamespace(version=version) for name, version in pins.items()}
    source = {"url": _requirements.ROOT.as_uri(), "dir_info": {"editable": True}}
    packages[_requirements.PROJECT] = SimpleNamespace(
        version=handler.__version__,
        read_text=lambda name: json.dumps(source),
        entry_points=[SimpleNamespace(name="vivit")],
        source=source,
    )
    monkeypatch.setattr(_requirements, "find_distribution", lambda name: packages.get(name.lower()))
    return packages


def missing(extras="test"):
    return list(_requirements.missing_requirements(extras))


@pytest.mark.parametrize("extras", ["", "serve,client", "test", "test,benchmark"])
def test_complete_environment_needs_nothing(installed, extras):
    assert missing(extras) == []


def test_local_version_of_torch_accepted(installed):
    installed["torch"].version += "+cpu"
    assert missing() == []


def test_missing_and_outdated_packages_named(installed):
    del installed["av"], installed["mypy"]
    installed["torch"].version = "2.4.0"
    assert [line.split(">")[0] for line in missing()] == ["av", "torch", "mypy"]
    assert missing()[1].endswith("(2.4.0 is installed)")
    assert [line.split(">")[0] for line in missing("")] == ["av", "torch"]


@pytest.mark.parametrize("change", ["version", "url", "editable", "command", "absent"])
def test_other_installation_of_project_not_accepted(installed, change):
    project = installed[_requirements.PROJECT]
    if change == "version":
        project.version = "0.0.1"
    elif change == "url":
        project.source["url"] = "file:///elsewhere"
    elif change == "editable":
        project.source["dir_info"] = {}
    elif change == "command":
        project.entry_points = []
    else:
        del installed[_requirements.PROJECT]
    assert len(missing()) == 1 and _requirements.PROJECT in missing()[0]


@pytest.mark.parametrize(
    "name, module, given",
    [
        ("build_archive.py", build, ["--export-path", str(_requirements.ROOT / "model_store"), "--name", "m"]),
        ("classify.py", classify, None),
        ("convert_scenic.py", convert, None),
    ],
)
def test_wrapper_runs_command(monkeypatch, name, module, given):
    called = []
    monkeypatch.setattr(sys, "argv", [name, "--name", "m"])
    monkeypatch.setattr(module, "main", lambda argv=None: called.append(argv) or 7)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    assert exit.value.code == 7 and called == [given]


@pytest.fixture
def run_without_packages(tmp_path):
    """Returns a function that runs scripts/classify.py of a new checkout with an interpreter without packages."""
    (tmp_path / "scripts").mkdir()
    for name in ("_checkout.py", "classify.py"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts")

    def run():
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [sys.executable, "-S", tmp_path / "scripts" / "classify.py", "my clip.mp4", "--jsonl"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_script_restarts_with_project_environment(run_without_packages, tmp_path):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    python.chmod(0o755)
    finished = run_without_packages()
    assert finished.stdout == f"{tmp_path / 'scripts' / 'classify.py'}|my clip.mp4|--jsonl|"


def test_script_without_environment_explains_setup(run_without_packages, tmp_path):
    finished = run_without_packages()
    assert finished.returncode == 1
    assert f"run {tmp_path / 'scripts' / 'setup'} first" in finished.stderr and "Traceback" not in finished.stderr
