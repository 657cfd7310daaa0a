"""The archive: what is in it, and what is refused before one is written."""

import importlib.util
import json
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from handler import VivitForVideoClassification
from handler.checkpoints.hub import CheckpointError
from handler.cli import build as builder
from handler.cli.build import BuildError, build_archive


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def build(checkpoint, store, **options):
    return build_archive(checkpoint=str(checkpoint), name="m", version="1.0", export_path=store, **options)


def read_json(archive, name):
    with zipfile.ZipFile(archive) as file:
        return json.loads(file.read(name))


def test_an_archive_holds_all_that_a_worker_needs(checkpoint, store):
    names = set(zipfile.ZipFile(build(checkpoint, store)).namelist())
    assert {
        "vivit_handler.py",
        "handler/__init__.py",
        "handler/classifier.py",
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "model-config.yaml",
        "MAR-INF/MANIFEST.json",
    } <= names
    assert not [name for name in names if "__pycache__" in name or name == "handler/vivit_handler.py"]


def test_the_manifest_names_model_version_and_handler(checkpoint, store):
    model = read_json(build(checkpoint, store), "MAR-INF/MANIFEST.json")["model"]
    assert (model["modelName"], model["modelVersion"], model["handler"]) == ("m", "1.0", "vivit_handler.py")
    assert model["configFile"] == "model-config.yaml"


def test_weights_travel_unchanged(checkpoint, store, tmp_path):
    archive = build(checkpoint, store)
    zipfile.ZipFile(archive).extract("model.safetensors", tmp_path)
    packed, original = load_file(tmp_path / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert packed.keys() == original.keys()
    assert all(torch.equal(packed[name], original[name]) for name in packed)


def test_weights_keep_the_checkpoints_dtype(checkpoint, store, tmp_path):
    half = tmp_path / "half"
    VivitForVideoClassification.from_pretrained(checkpoint, torch_dtype=torch.float16).save_pretrained(half)
    (half / "preprocessor_config.json").write_bytes((checkpoint / "preprocessor_config.json").read_bytes())
    zipfile.ZipFile(build(half, store)).extract("model.safetensors", tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}


def test_labels_of_a_file_name_the_classes(checkpoint, store, tmp_path):
    names = [f"class {index}" for index in range(9)]
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(names) + "\n")
    config = read_json(build(checkpoint, store, labels=str(labels)), "config.json")
    assert [config["id2label"][str(index)] for index in range(9)] == names


def test_the_kinetics_labels_are_400_in_alphabetical_order():
    names = builder.read_labels("kinetics400")
    assert len(names) == 400
    assert names == sorted(names, key=str.lower)
    assert names[116] == "eating spaghetti"


def test_placeholder_labels_are_pointed_out(checkpoint, store, capsys):
    build(checkpoint, store)
    assert "LABEL_0 ... LABEL_8" in capsys.readouterr().err


def test_labels_of_another_number_are_refused(checkpoint, store):
    with pytest.raises(BuildError, match="has 9 classes, but --labels names 400"):
        build(checkpoint, store, labels="kinetics400")


def test_labels_that_repeat_are_refused(checkpoint, store, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("walk\nrun\nwalk\n")
    with pytest.raises(BuildError, match="'walk' more than once"):
        build(checkpoint, store, labels=str(labels))


def test_an_unknown_label_set_is_answered_with_those_that_there_are(checkpoint, store):
    with pytest.raises(BuildError, match="kinetics400"):
        build(checkpoint, store, labels="kinetics4000")


def test_an_archive_in_the_way_needs_force(checkpoint, store):
    archive = build(checkpoint, store)
    before = archive.stat().st_mtime_ns
    with pytest.raises(BuildError, match="--force replaces it"):
        build(checkpoint, store)
    assert archive.stat().st_mtime_ns == before
    build(checkpoint, store, force=True)
    assert archive.stat().st_mtime_ns > before


@pytest.mark.parametrize("name", ["", "a b", "../m", "-m", "ä"])
def test_a_name_that_torchserve_cannot_serve_is_refused(checkpoint, store, name):
    with pytest.raises(BuildError, match=f"--name becomes part of URLs.* got {name!r}"):
        build_archive(checkpoint=str(checkpoint), name=name, version="1.0", export_path=store)
    assert not store.exists()


@pytest.mark.parametrize("version", ["", "x/y z", "1.0/", "..", "1?", "ä"])
def test_a_version_that_no_url_can_name_is_refused(checkpoint, store, version):
    with pytest.raises(BuildError, match=f"--version becomes part of URLs.* got {re.escape(repr(version))}"):
        build_archive(checkpoint=str(checkpoint), name="m", version=version, export_path=store)
    assert not store.exists()


def test_versions_of_several_parts_are_fine(checkpoint, store):
    archive = build_archive(checkpoint=str(checkpoint), name="m", version="2.0-rc_1", export_path=store)
    assert read_json(archive, "MAR-INF/MANIFEST.json")["model"]["modelVersion"] == "2.0-rc_1"


@pytest.mark.parametrize(
    "text, message",
    [
        ("handler:\n  topk: 3\n", "did you mean 'top_k'"),
        ("handler:\n  dtype: int4\n", "dtype must be one of"),
        ("handler: 3\n", "key: value"),
        ("- a\n", "key: value"),
        ("handler: {", "not valid YAML"),
        ("responseTimeOut: 7\n", "unknown key 'responseTimeOut': did you mean 'responseTimeout'"),
        ("batchsize: 8\n", "did you mean 'batchSize'"),
        ("handlers:\n  top_k: 3\n", "did you mean 'handler'"),
        ("rubbish: 1\n", "unknown key 'rubbish': known are .*responseTimeout.*handler"),
        ("on: 1\n", "unknown key True"),  # so YAML reads it
        ("top_k: 3\n", "'top_k' must stand below `handler:`"),
    ],
)
def test_a_broken_configuration_is_refused(checkpoint, store, tmp_path, text, message):
    config = tmp_path / "model-config.yaml"
    config.write_text(text)
    with pytest.raises(BuildError, match=message):
        build(checkpoint, store, config=config)
    assert not store.exists()


def test_a_configuration_of_any_name_is_packed_as_it_is(checkpoint, store, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("responseTimeout: 7\nhandler:\n  top_k: 2\n")
    archive = build(checkpoint, store, config=config)
    assert zipfile.ZipFile(archive).read("model-config.yaml") == config.read_bytes()


def test_every_key_that_torchserve_reads_of_a_configuration_is_known():
    package = Path(importlib.util.find_spec("ts").origin).parent
    with zipfile.ZipFile(package / "frontend" / "model-server.jar") as jar:
        strings = java_strings(jar.read("org/pytorch/serve/archive/model/ModelConfig.class"))
    # The others are sentences for the log.
    assert {string for string in strings if string.isalpha()} == set(builder.TORCHSERVE_KEYS)


def java_strings(code: bytes) -> list[str]:
    """The string literals of a compiled Java class: those entries of its constant pool."""
    # Bytes after the tag; https://docs.oracle.com/javase/specs/jvms/se17/html/jvms-4.html#jvms-4.4
    sizes = {3: 4, 4: 4, 5: 8, 6: 8, 7: 2, 8: 2, 9: 4, 10: 4, 11: 4, 12: 4, 15: 3, 16: 2, 17: 4, 18: 4, 19: 2, 20: 2}
    texts, literals = {}, []
    (count,), position, index = struct.unpack_from(">H", code, 8), 10, 1
    while index < count:
        tag, (number,) = code[position], struct.unpack_from(">H", code, position + 1)
        if tag == 1:
            texts[index] = code[position + 3 : position + 3 + number].decode()
        elif tag == 8:
            literals.append(number)
        position += 3 + number if tag == 1 else 1 + sizes[tag]
        index += 2 if tag in (5, 6) else 1  # a long and a double count twice
    return [texts[number] for number in literals]


@pytest.mark.parametrize("key", [*builder.TORCHSERVE_KEYS, *builder.SECTIONS])
def test_what_torchserve_and_handlers_read_of_a_configuration_is_accepted(tmp_path, key):
    config = tmp_path / "model-config.yaml"
    config.write_text(f"{key}: {{}}\n")
    assert builder.read_options(config) == builder.HandlerOptions()


def test_missing_weights_are_refused(checkpoint, store, damage):
    def drop(state):
        del state["classifier.bias"]

    with pytest.raises(CheckpointError, match="classifier.bias"):
        build(damage(drop), store)
    assert not store.exists()


def test_weights_that_give_no_numbers_are_refused(checkpoint, store, damage):
    def spoil(state):
        state["classifier.weight"][0, 0] = float("nan")

    with pytest.raises(BuildError, match="NaN or infinite"):
        build(damage(spoil), store)
    assert not store.exists()


def test_an_image_processor_that_does_not_fit_is_refused(checkpoint, store, damage):
    broken = damage(lambda state: None)
    settings = json.loads((broken / "preprocessor_config.json").read_text())
    settings["crop_size"] = {"height": 24, "width": 24}
    (broken / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"\(32, 32\).*\(24, 24\)"):
        build(broken, store)


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_is_refused_by_name(store, damage, missing):
    broken = damage(lambda state: None)
    (broken / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        build(broken, store)


@pytest.fixture
def damage(checkpoint, tmp_path):
    """Copies the checkpoint after `change` has been at its weights."""

    def copy(change):
        target = tmp_path / "damaged"
        target.mkdir()
        state = load_file(checkpoint / "model.safetensors")
        change(state)
        save_file(state, target / "model.safetensors")
        for name in ("config.json", "preprocessor_config.json"):
            (target / name).write_bytes((checkpoint / name).read_bytes())
        return target

    return copy
