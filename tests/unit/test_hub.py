"""Files from a directory or from a hub, which is a local server that answers as the hub does."""

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

from handler import VivitConfig, VivitForVideoClassification
from handler.checkpoints.files import load_state_dict
from handler.checkpoints.hub import (
    CheckpointAccessError,
    CheckpointConnectionError,
    CheckpointError,
    CheckpointFileError,
    CheckpointNotFoundError,
    fetch,
    read_json,
)
from tests.support.hub_server import TOKEN, HubServer, commit

ROOT = Path(__file__).parents[2]


def take_for_the_hub(url: str, monkeypatch) -> None:
    """What HF_ENDPOINT does; the library reads that once, when it is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch):
    """A hub with one open repository; this process takes it for the hub and has no login."""
    from huggingface_hub import constants

    with HubServer() as server:
        server.add("owner/open", {"config.json": b'{"from": "main"}'})
        take_for_the_hub(server.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def test_a_local_directory_is_preferred_and_gives_the_first_name_it_has(tmp_path):
    for name in ("b.json", "c.json"):
        (tmp_path / name).write_text("{}")

    assert fetch(tmp_path, ["a.json", "b.json", "c.json"]) == tmp_path / "b.json"
    assert fetch(str(tmp_path), "c.json") == tmp_path / "c.json"


def test_a_local_directory_without_the_file_names_all_that_were_looked_for(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="has no a.json or b.json"):
        fetch(tmp_path, ["a.json", "b.json"])


@pytest.mark.parametrize(
    "path", ["./nowhere", "/nowhere/at/all", "a/b/c", "a\\b", "~/x", "trailing/", "..x", "", Path("a/b")]
)
def test_what_looks_like_a_path_and_is_not_there_never_reaches_the_hub(hub, path):
    with pytest.raises(CheckpointNotFoundError, match="there is no directory"):
        fetch(path, "config.json")
    assert hub.asked == []


def test_a_file_in_place_of_a_directory_is_said_to_be_one(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointNotFoundError, match="is a file, expected a directory"):
        fetch(file, "config.json")


def test_a_download_has_the_content_of_the_repository(hub, tmp_path):
    path = fetch("owner/open", "config.json", cache_dir=tmp_path)

    assert path.read_bytes() == b'{"from": "main"}'
    assert tmp_path in path.parents


@pytest.mark.parametrize("revision", ["v1", commit("v1")])
def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, tmp_path, revision):
    hub.add("owner/open", {"config.json": b'{"from": "v1"}'}, revision="v1")
    path = fetch("owner/open", "config.json", revision=revision, cache_dir=tmp_path)

    assert json.loads(path.read_text()) == {"from": "v1"}


def test_the_next_name_is_tried_where_the_first_is_not_in_the_repository(hub, tmp_path):
    assert fetch("owner/open", ["absent.json", "config.json"], cache_dir=tmp_path).name == "config.json"


def test_what_is_in_the_cache_is_not_downloaded_again(hub, tmp_path):
    first = fetch("owner/open", "config.json", cache_dir=tmp_path)
    hub.asked.clear()

    assert fetch("owner/open", "config.json", cache_dir=tmp_path) == first
    assert [method for method, _ in hub.asked] == ["HEAD"]  # whether it changed, and no GET


def test_local_files_only_reads_the_cache_and_asks_nobody(hub, tmp_path):
    first = fetch("owner/open", "config.json", cache_dir=tmp_path)
    hub.asked.clear()

    names = ["absent.json", "config.json"]
    assert fetch("owner/open", names, cache_dir=tmp_path, local_files_only=True) == first
    assert hub.asked == []


def test_local_files_only_without_the_file_in_the_cache_says_so(hub, tmp_path):
    with pytest.raises(CheckpointConnectionError, match="the cache does not contain its config.json"):
        fetch("owner/open", "config.json", cache_dir=tmp_path, local_files_only=True)
    assert hub.asked == []


def test_a_missing_repository(hub, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="owner/absent is neither a local directory"):
        fetch("owner/absent", "config.json", cache_dir=tmp_path)


def test_a_missing_revision(hub, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="owner/open has no revision 'v9'"):
        fetch("owner/open", "config.json", revision="v9", cache_dir=tmp_path)


def test_a_missing_file_names_all_that_were_looked_for(hub, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="owner/open has no a.json or b.json"):
        fetch("owner/open", ["a.json", "b.json"], cache_dir=tmp_path)


def test_a_gated_repository_asks_for_a_token_and_opens_with_it(hub, tmp_path):
    hub.add("owner/gated", {"config.json": b"{}"})
    hub.gated.add("owner/gated")

    with pytest.raises(CheckpointAccessError, match="gated repository: request access"):
        fetch("owner/gated", "config.json", cache_dir=tmp_path)
    assert fetch("owner/gated", "config.json", cache_dir=tmp_path, token=TOKEN).read_bytes() == b"{}"


def test_a_private_repository_looks_missing_and_opens_with_a_token(hub, tmp_path):
    hub.add("owner/private", {"config.json": b"{}"})
    hub.private.add("owner/private")

    with pytest.raises(CheckpointNotFoundError, match="a private one needs token"):
        fetch("owner/private", "config.json", cache_dir=tmp_path)
    assert fetch("owner/private", "config.json", cache_dir=tmp_path, token=TOKEN).read_bytes() == b"{}"


def test_a_token_that_the_hub_does_not_know(hub, tmp_path):
    with pytest.raises(CheckpointAccessError, match="rejected the token"):
        fetch("owner/open", "config.json", cache_dir=tmp_path, token="hf_wrong")


@pytest.mark.parametrize("name", ["owner/-open", "double--dash/x", "a" * 200])
def test_what_is_no_hub_id_is_said_to_be_none(hub, tmp_path, name):
    with pytest.raises(CheckpointNotFoundError, match="there is no directory|nor a valid hub id"):
        fetch(name, "config.json", cache_dir=tmp_path)
    assert hub.asked == []


def test_a_hub_that_is_down_is_asked_for_one_file_and_the_cache_for_all(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the library waits between its attempts
    cached = fetch("owner/open", "config.json", cache_dir=tmp_path / "warm")
    hub.asked.clear()
    hub.is_down = True

    names = ["first.json", "config.json"]
    assert fetch("owner/open", names, cache_dir=tmp_path / "warm") == cached
    with pytest.raises(CheckpointConnectionError, match="the cache does not contain its first.json or config.json"):
        fetch("owner/open", names, cache_dir=tmp_path / "cold")
    assert hub.asked and all(path.endswith("first.json") for _, path in hub.asked)


def test_a_hub_that_cannot_be_reached(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    take_for_the_hub(f"http://127.0.0.1:{port}", monkeypatch)
    with pytest.raises(CheckpointConnectionError, match="the hub cannot be reached: .*[Cc]onnect"):
        fetch("owner/open", "config.json", cache_dir=tmp_path)


def test_a_checkpoint_in_shards_comes_with_all_of_them_or_names_the_missing(hub, tmp_path):
    tensors = {"vivit.layernorm.weight": torch.ones(2), "classifier.bias": torch.zeros(3)}
    shards = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    files = {shards[name]: save({name: tensor}) for name, tensor in tensors.items()}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": shards}).encode()
    hub.add("owner/sharded", files)
    without_one = {name: content for name, content in files.items() if name != "model-1.safetensors"}
    hub.add("owner/broken", without_one)

    loaded = load_state_dict("owner/sharded", cache_dir=tmp_path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with pytest.raises(CheckpointNotFoundError, match="owner/broken has no model-1.safetensors, listed in"):
        load_state_dict("owner/broken", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "error, parent",
    [
        (CheckpointNotFoundError, FileNotFoundError),
        (CheckpointAccessError, PermissionError),
        (CheckpointConnectionError, ConnectionError),
        (CheckpointFileError, ValueError),
    ],
)
def test_errors_are_of_one_family_and_caught_by_the_standard_names(error, parent):
    assert issubclass(error, CheckpointError)
    assert issubclass(error, parent)
    assert str(error("a sentence")) == "a sentence"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_anything_but_a_json_object_is_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointFileError, match="config.json: expected a JSON object"):
        read_json(tmp_path / "config.json")


def run_python(code: str, environment: dict[str, str], cwd: Path) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_environment_of_a_process_names_the_hub_its_cache_and_offline_use(tmp_path):
    """The documented way, HF_ENDPOINT and HF_HUB_OFFLINE, without a hand in the library."""
    size = {"image_size": 16, "num_frames": 2, "hidden_size": 8, "intermediate_size": 8}
    config = VivitConfig(**size, num_hidden_layers=1, num_attention_heads=2)
    model = VivitForVideoClassification(config).eval()
    model.save_pretrained(tmp_path / "published")
    pixel_values = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(1, 2, 3, 16, 16)
    code = """
        import torch
        from handler import VivitForVideoClassification
        from handler.checkpoints.hub import CheckpointConnectionError
        model = VivitForVideoClassification.from_pretrained("owner/tiny")
        pixel_values = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(1, 2, 3, 16, 16)
        print(model(pixel_values).logits.tolist())
        try:
            VivitForVideoClassification.from_pretrained("owner/other")
        except OSError as error:
            print(type(error).__name__)
    """
    with HubServer() as server:
        server.add("owner/tiny", tmp_path / "published")
        online = run_python(code, server.environment(tmp_path / "cache"), tmp_path).splitlines()
        server.asked.clear()
        environment = {**server.environment(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        offline = run_python(code, environment, tmp_path).splitlines()
        assert server.asked == []

    assert torch.allclose(torch.tensor(json.loads(online[0])), model(pixel_values).logits, atol=1e-6)
    assert online[1] == "CheckpointNotFoundError"
    assert offline == [online[0], "CheckpointConnectionError"]


def test_a_local_checkpoint_needs_no_hub_library(tmp_path):
    """A serving worker reads a directory: the library is neither needed nor imported."""
    (tmp_path / "config.json").write_text('{"model_type": "vivit"}')
    code = """
        import sys
        sys.modules["huggingface_hub"] = None  # an import of it would fail
        from handler import VivitConfig
        print(VivitConfig.from_pretrained(".").hidden_size)
    """
    assert run_python(code, dict(os.environ), tmp_path).strip() == "768"
