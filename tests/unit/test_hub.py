"""Fetching files from a directory or from the hub, which a local server imitates."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from handler import VivitConfig, VivitForVideoClassification, VivitImageProcessor
from handler.checkpoints.files import load_state_dict
from handler.checkpoints.hub import (
    CheckpointAccessError,
    CheckpointConnectionError,
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    fetch,
    read_json,
)
from tests.support.hub_server import TOKEN, HubServer, commit

ROOT = Path(__file__).parents[2]


def set_endpoint(url: str, monkeypatch) -> None:
    """Has the effect of HF_ENDPOINT, which the library reads only when it is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch):
    """A hub with one public repository, used by this process without a login."""
    from huggingface_hub import constants

    with HubServer() as server:
        server.add("owner/public", {"config.json": b'{"from": "main"}'})
        set_endpoint(server.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


# Local directories


def test_first_existing_name_of_local_directory(tmp_path):
    for name in ("b.json", "c.json"):
        (tmp_path / name).write_text("{}")

    assert fetch(tmp_path, ["a.json", "b.json", "c.json"]) == tmp_path / "b.json"
    assert fetch(str(tmp_path), "c.json") == tmp_path / "c.json"
    with pytest.raises(CheckpointNotFoundError, match=r"has no a.json or d.json"):
        fetch(tmp_path, ["a.json", "d.json"])


def test_local_directory_takes_precedence_over_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner", "public").mkdir(parents=True)
    Path("owner", "public", "config.json").write_text("{}")

    assert fetch("owner/public", "config.json") == Path("owner", "public", "config.json")
    assert hub.requests == []


@pytest.mark.parametrize(
    "path", ["./nowhere", "/nowhere/at/all", "a/b/c", "a\\b", "~/x", "trailing/", "..x", "", Path("a/b")]
)
def test_missing_path_never_requested_from_hub(hub, path):
    with pytest.raises(CheckpointNotFoundError, match="there is no directory"):
        fetch(path, "config.json")
    assert hub.requests == []


def test_file_instead_of_directory(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointNotFoundError, match="is a file, expected a directory"):
        fetch(file, "config.json")


# Downloads


def test_download(hub, tmp_path):
    path = fetch("owner/public", ["absent.json", "config.json"], cache_dir=tmp_path)

    assert path.name == "config.json"
    assert path.read_bytes() == b'{"from": "main"}'
    assert tmp_path in path.parents


@pytest.mark.parametrize("revision", ["v1", commit("v1")])
def test_revision_by_name_or_commit(hub, tmp_path, revision):
    hub.add("owner/public", {"config.json": b'{"from": "v1"}'}, revision="v1")
    path = fetch("owner/public", "config.json", revision=revision, cache_dir=tmp_path)

    assert json.loads(path.read_text()) == {"from": "v1"}


def test_cached_file_not_downloaded_again(hub, tmp_path):
    first = fetch("owner/public", "config.json", cache_dir=tmp_path)
    hub.requests.clear()

    assert fetch("owner/public", "config.json", cache_dir=tmp_path) == first
    assert [method for method, _ in hub.requests] == ["HEAD"]  # whether it has changed


def test_local_files_only(hub, tmp_path):
    with pytest.raises(CheckpointConnectionError, match=r"the cache does not contain its config.json"):
        fetch("owner/public", "config.json", cache_dir=tmp_path, local_files_only=True)
    assert hub.requests == []
    first = fetch("owner/public", "config.json", cache_dir=tmp_path)
    hub.requests.clear()

    names = ["absent.json", "config.json"]
    assert fetch("owner/public", names, cache_dir=tmp_path, local_files_only=True) == first
    assert hub.requests == []


def test_missing_repository_revision_or_file(hub, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="owner/absent is neither a local directory nor a visible"):
        fetch("owner/absent", "config.json", cache_dir=tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="owner/public has no revision 'v9'"):
        fetch("owner/public", "config.json", revision="v9", cache_dir=tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"owner/public has no a.json or b.json"):
        fetch("owner/public", ["a.json", "b.json"], cache_dir=tmp_path)


@pytest.mark.parametrize(
    "kind, error, message",
    [
        ("gated", CheckpointAccessError, "gated repository: request access"),
        ("private", CheckpointNotFoundError, "a private one needs token"),
    ],
)
def test_token_for_protected_repository(hub, tmp_path, kind, error, message):
    hub.add("owner/protected", {"config.json": b"{}"})
    getattr(hub, kind).add("owner/protected")

    with pytest.raises(error, match=message):
        fetch("owner/protected", "config.json", cache_dir=tmp_path)
    assert fetch("owner/protected", "config.json", cache_dir=tmp_path, token=TOKEN).read_bytes() == b"{}"


def test_invalid_token(hub, tmp_path):
    with pytest.raises(CheckpointAccessError, match="rejected the token"):
        fetch("owner/public", "config.json", cache_dir=tmp_path, token="hf_wrong")


@pytest.mark.parametrize("name", ["owner/-open", "double--dash/x", "a" * 200])
def test_invalid_hub_id(hub, tmp_path, name):
    with pytest.raises(CheckpointNotFoundError, match="there is no directory|nor a valid hub id"):
        fetch(name, "config.json", cache_dir=tmp_path)
    assert hub.requests == []


def test_failing_hub_requested_once_then_cache_used(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between attempts of the library
    cached = fetch("owner/public", "config.json", cache_dir=tmp_path / "warm")
    hub.requests.clear()
    hub.is_failing = True

    names = ["first.json", "config.json"]
    assert fetch("owner/public", names, cache_dir=tmp_path / "warm") == cached
    with pytest.raises(CheckpointConnectionError, match=r"the cache does not contain its first.json or config.json"):
        fetch("owner/public", names, cache_dir=tmp_path / "cold")
    assert hub.requests and all(path.endswith("first.json") for _, path in hub.requests)


def test_unreachable_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    set_endpoint(f"http://127.0.0.1:{port}", monkeypatch)
    with pytest.raises(CheckpointConnectionError, match=r"the hub cannot be reached: .*[Cc]onnect"):
        fetch("owner/public", "config.json", cache_dir=tmp_path)


def test_sharded_checkpoint(hub, tmp_path):
    tensors = {"vivit.layernorm.weight": torch.ones(2), "classifier.bias": torch.zeros(3)}
    shards = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    files = {shards[name]: save({name: tensor}) for name, tensor in tensors.items()}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": shards}).encode()
    hub.add("owner/sharded", files)
    hub.add("owner/broken", {name: content for name, content in files.items() if name != "model-1.safetensors"})

    loaded = load_state_dict("owner/sharded", cache_dir=tmp_path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with pytest.raises(CheckpointNotFoundError, match=r"owner/broken has no model-1.safetensors, listed in"):
        load_state_dict("owner/broken", cache_dir=tmp_path)


def test_hub_options_reach_all_files(hub, tmp_path):
    size = {"image_size": 16, "num_frames": 2, "hidden_size": 8, "intermediate_size": 8}
    model = VivitForVideoClassification(VivitConfig(**size, num_hidden_layers=1, num_attention_heads=2))
    processor = VivitImageProcessor(size=16, crop_size=16)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    hub.add("owner/private", tmp_path / "saved", revision="v1")
    hub.private.add("owner/private")
    cached = {"revision": "v1", "cache_dir": tmp_path / "cache"}

    for options in ({**cached, "token": TOKEN}, {**cached, "local_files_only": True}):
        loaded = VivitForVideoClassification.from_pretrained("owner/private", **options)
        assert torch.equal(loaded.classifier.weight, model.classifier.weight)
        assert VivitConfig.from_pretrained("owner/private", **options) == model.config
        assert VivitImageProcessor.from_pretrained("owner/private", **options) == processor
    for pretrained in (VivitForVideoClassification, VivitConfig, VivitImageProcessor):
        with pytest.raises(TypeError, match="revison"):
            pretrained.from_pretrained(tmp_path / "saved", revison="v1")


# Environment


def run_python(code: str, environment: dict[str, str], cwd: Path) -> list[str]:
    """Runs code in a new process and returns the lines that it prints."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_environment_sets_endpoint_cache_and_offline_mode(tmp_path):
    code = """
        from handler.checkpoints.hub import fetch
        for name in ("owner/tiny", "owner/other"):
            try:
                print(fetch(name, "config.json"))
            except OSError as error:
                print(type(error).__name__)
    """
    with HubServer() as server:
        server.add("owner/tiny", {"config.json": b"{}"})
        environment = server.environment(tmp_path / "cache")
        path, error = run_python(code, environment, tmp_path)
        server.requests.clear()
        offline = run_python(code, {**environment, "HF_HUB_OFFLINE": "1"}, tmp_path)
        assert server.requests == []

    assert tmp_path / "cache" in Path(path).parents
    assert error == "CheckpointNotFoundError"
    assert offline == [path, "CheckpointConnectionError"]


def test_local_checkpoint_without_hub_library(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vivit"}')
    code = """
        import sys
        sys.modules["huggingface_hub"] = None  # makes every import fail
        from handler.checkpoints.hub import fetch
        print(fetch(".", "config.json"))
    """
    assert run_python(code, dict(os.environ), tmp_path) == ["config.json"]


# Errors


@pytest.mark.parametrize(
    "error, parent",
    [
        (CheckpointNotFoundError, FileNotFoundError),
        (CheckpointAccessError, PermissionError),
        (CheckpointConnectionError, ConnectionError),
        (CheckpointFileError, ValueError),
        (CheckpointMismatchError, ValueError),
    ],
)
def test_errors_have_standard_parents(error, parent):
    assert issubclass(error, CheckpointError)
    assert issubclass(error, parent)
    assert str(error("a sentence")) == "a sentence"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000], ids=range(6))
def test_json_without_object_rejected(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointFileError, match=r"config.json: expected a JSON object"):
        read_json(tmp_path / "config.json")
