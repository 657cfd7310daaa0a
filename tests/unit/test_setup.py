"""The offline check of scripts/setup: what counts as installed."""

import json
from types import SimpleNamespace

import _requirements
import pytest
from packaging.requirements import Requirement

import handler


@pytest.fixture
def installed(monkeypatch):
    """An environment in which everything of `test` has the pinned version; tests change it."""
    pins = {}
    for line in _requirements.lines((_requirements.ROOT / "scripts" / "constraints.txt").read_text()):
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
