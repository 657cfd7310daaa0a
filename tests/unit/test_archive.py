"""What `vivit build` writes into an archive and into config.properties, and which inputs it rejects."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import handler
from handler import VivitConfig, VivitForVideoClassification
from handler.assets import MODEL_CONFIG, SERVER_CONFIG
from handler.checkpoints.hub import CheckpointError
from handler.cli import build as builder
from handler.cli import check as check_module
from handler.cli.archives import ArchiveError, build_if_outdated, read_archive
from handler.cli.build import BuildError, build_archive
from handler.cli.checkpoint import read_labels
from handler.cli.main import main
from handler.cli.properties import add_model, read_models, read_properties
from handler.options import HandlerOptions

NAMES = [f"class {index}" for index in range(9)]


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """Returns a function that copies the checkpoint and changes the weights of the copy."""

    def copy(change=lambda state: None):
        target = tmp_path / "damaged"
        target.mkdir()
        state = load_file(checkpoint / "model.safetensors")
        change(state)
        save_file(state, target / "model.safetensors")
        for name in ("config.json", "preprocessor_config.json"):
            (target / name).write_bytes((checkpoint / name).read_bytes())
        return target

    return copy


def build(checkpoint, store, *, name="m", version="1.0", **options):
    return build_archive(checkpoint=str(checkpoint), name=name, version=version, export_path=store, **options)


def read(archive, name):
    with zipfile.ZipFile(archive) as file:
        return file.read(name)


# Contents


def test_archive_contents(checkpoint, store, tmp_path):
    archive = build(checkpoint, store, version="2.0-rc_1")
    with zipfile.ZipFile(archive) as file:
        names = set(file.namelist())
        file.extract("model.safetensors", tmp_path)
    package = Path(handler.__file__).parent
    expected = {
        f"handler/{path.relative_to(package)}"
        for path in package.rglob("*.py")
        if not {"assets", "cli", "training", "corpus"} & set(path.relative_to(package).parts)
    }
    assert names == expected - {"handler/vivit_handler.py"} | {
        "vivit_handler.py",
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "model-config.yaml",
        "MAR-INF/MANIFEST.json",
    }
    model = json.loads(read(archive, "MAR-INF/MANIFEST.json"))["model"]
    assert (model["modelName"], model["modelVersion"], model["handler"]) == ("m", "2.0-rc_1", "vivit_handler.py")
    assert model["configFile"] == "model-config.yaml"
    packed, original = load_file(tmp_path / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert packed.keys() == original.keys()
    assert all(torch.equal(packed[name], original[name]) for name in packed)


def test_archived_weights_keep_dtype(checkpoint, store, tmp_path):
    half = tmp_path / "half"
    VivitForVideoClassification.from_pretrained(checkpoint, torch_dtype=torch.float16).save_pretrained(half)
    (half / "preprocessor_config.json").write_bytes((checkpoint / "preprocessor_config.json").read_bytes())
    with zipfile.ZipFile(build(half, store)) as file:
        file.extract("model.safetensors", tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}


# Labels


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_labels_file_names_classes(checkpoint, store, tmp_path, encoding):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(NAMES) + "\n", encoding=encoding)
    config = json.loads(read(build(checkpoint, store, labels=str(labels)), "config.json"))
    assert [config["id2label"][str(index)] for index in range(9)] == NAMES


def test_labels_unique_within_label_head(checkpoint, store, tmp_path):
    saved = tmp_path / "two heads"
    shutil.copytree(checkpoint, saved)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "label_heads": {"verb": 4, "noun": 5}}))
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("abcdcdefg"))
    archived = json.loads(read(build(saved, store, labels=str(labels)), "config.json"))
    assert list(archived["id2label"].values()) == list("abcdcdefg")
    assert archived["label_heads"] == [["verb", 4], ["noun", 5]]
    labels.write_text("\n".join("abcdcdefc"))
    with pytest.raises(BuildError, match=r"unique class labels within the head 'noun', got \['c'\]"):
        build(saved, store, labels=str(labels), force=True)


def test_kinetics400_labels_alphabetical():
    names = read_labels("kinetics400")
    assert len(names) == 400
    assert names == sorted(names, key=str.lower)
    assert names[116] == "eating spaghetti"


def test_placeholder_labels_warned_about(checkpoint, store, caplog):
    build(checkpoint, store)
    assert "LABEL_0 ... LABEL_8" in caplog.text


@pytest.mark.parametrize(
    "labels, message",
    [
        ("kinetics400", "has 9 classes, but --labels names 400"),
        ("kinetics4000", r"one of \[kinetics400\] or a text file"),
        (b"walk\nrun\nwalk\nd\ne\nf\ng\nh\ni\n", r"labels.txt: id2label must .* unique class labels, got \['walk'\]"),
    ],
)
def test_wrong_labels_rejected(checkpoint, store, tmp_path, labels, message):
    if isinstance(labels, bytes):
        (tmp_path / "labels.txt").write_bytes(labels)
        labels = str(tmp_path / "labels.txt")
    with pytest.raises(BuildError, match=message):
        build(checkpoint, store, labels=labels)
    assert not store.exists()


# Names and existing archives


def test_existing_archive_needs_force(checkpoint, store):
    archive = build(checkpoint, store)
    before = archive.stat().st_mtime_ns
    with pytest.raises(BuildError, match="--force replaces it"):
        build(checkpoint, store)
    assert archive.stat().st_mtime_ns == before
    build(checkpoint, store, force=True)
    assert archive.stat().st_mtime_ns > before


def test_failed_build_keeps_old_archive(checkpoint, store, monkeypatch):
    archive = build(checkpoint, store)
    content = archive.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(builder, "HANDLER", checkpoint)  # has no entry file: the archiver fails
        with pytest.raises(BuildError, match="torch-model-archiver failed"):
            build(checkpoint, store, force=True)
    assert archive.read_bytes() == content and list(store.iterdir()) == [archive]


@pytest.mark.parametrize("argument", ["name", "version"])
@pytest.mark.parametrize("value", ["", "a b", "../m", "-m", "ä", "1.0/", "1?"])
def test_names_invalid_in_urls_rejected(checkpoint, store, argument, value):
    with pytest.raises(BuildError, match=f"--{argument} becomes part of URLs.* got {re.escape(repr(value))}"):
        build(checkpoint, store, **{argument: value})
    assert not store.exists()


# model-config.yaml


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
        ("on: 1\n", "unknown key True"),  # YAML 1.1 reads `on` as true
        ("top_k: 3\n", "'top_k' must be below `handler:`"),
    ],
)
def test_invalid_model_config_rejected(checkpoint, store, tmp_path, text, message):
    config = tmp_path / "model-config.yaml"
    config.write_text(text)
    with pytest.raises(BuildError, match=message):
        build(checkpoint, store, config=config)
    assert not store.exists()


def test_complete_model_config_copied(checkpoint, store, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("# mine\nresponseTimeout: 7\nstartupTimeout: 8\nhandler:\n  top_k: 2\n")
    assert read(build(checkpoint, store, config=config), "model-config.yaml") == config.read_bytes()


@pytest.mark.parametrize("text", ["handler:\n  top_k: 2\n", "{responseTimeout: null, handler: {top_k: 2}}", ""])
def test_missing_timeouts_completed(checkpoint, store, tmp_path, text):
    config = tmp_path / "mine.yaml"
    config.write_text(text)
    packed = yaml.safe_load(read(build(checkpoint, store, config=config), "model-config.yaml"))
    given = yaml.safe_load(text) or {}
    assert packed == {**given, "responseTimeout": 300, "startupTimeout": 300}
    assert config.read_text() == text


def test_all_torchserve_keys_known(tmp_path):
    package = Path(importlib.util.find_spec("ts").origin).parent
    with zipfile.ZipFile(package / "frontend" / "model-server.jar") as jar:
        strings = java_strings(jar.read("org/pytorch/serve/archive/model/ModelConfig.class"))
    # The other strings are log messages.
    assert {string for string in strings if string.isalpha()} == set(builder.TORCHSERVE_KEYS)
    config = tmp_path / "model-config.yaml"
    config.write_text("".join(f"{key}: {{}}\n" for key in [*builder.TORCHSERVE_KEYS, *builder.SECTIONS]))
    assert builder.read_options(config) == HandlerOptions()


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


# Checkpoints


def test_missing_weights_rejected(store, damaged):
    with pytest.raises(CheckpointError, match=r"classifier\.bias"):
        build(damaged(lambda state: state.pop("classifier.bias")), store)
    assert not store.exists()


def test_weights_with_nan_output_rejected(store, damaged):
    def spoil(state):
        state["classifier.weight"][0, 0] = float("nan")

    with pytest.raises(BuildError, match="NaN or infinite"):
        build(damaged(spoil), store)
    assert not store.exists()


def test_image_processor_of_other_size_rejected(store, damaged):
    broken = damaged()
    settings = json.loads((broken / "preprocessor_config.json").read_text())
    settings["crop_size"] = {"height": 24, "width": 24}
    (broken / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"\(32, 32\).*\(24, 24\)"):
        build(broken, store)


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_missing_file_named(store, damaged, missing):
    broken = damaged()
    (broken / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        build(broken, store)


# Archives that `vivit serve` builds


def test_archive_rebuilt_only_if_outdated(store, damaged, tmp_path):
    source, labels = damaged(), tmp_path / "labels.txt"
    labels.write_text("\n".join(NAMES))

    def built_ns(**options):
        archive = build_if_outdated(checkpoint=str(source), name="m", version="1.0", model_store=store, **options)
        assert (archive.name, archive.version, archive.load_entry) == ("m", "1.0", "m.mar")
        return archive.path.stat().st_mtime_ns

    def built_after_change_ns(path, **options):
        later_s = (store / "m.mar").stat().st_mtime + 10
        os.utime(path, (later_s, later_s))
        try:
            return built_ns(**options)
        finally:
            os.utime(path, (0, 0))

    first = built_ns()
    assert built_ns() == first
    with_labels = built_ns(labels=str(labels))
    assert with_labels > first and built_ns(labels=str(labels)) == with_labels
    after_labels = built_after_change_ns(labels, labels=str(labels))
    after_source = built_after_change_ns(source / "config.json", labels=str(labels))
    assert with_labels < after_labels < after_source == built_ns(labels=str(labels))
    assert built_ns(labels=str(labels), rebuild=True) > after_source


def test_archive_served_under_other_name(checkpoint, store):
    archive = read_archive(build(checkpoint, store), name="other")
    assert (archive.name, archive.version, archive.load_entry) == ("other", "1.0", "other=m.mar")


@pytest.mark.parametrize("content, message", [(None, "there is no archive"), (b"PK", "is not an archive")])
def test_unusable_archive_rejected(tmp_path, content, message):
    path = tmp_path / "m.mar"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArchiveError, match=message):
        read_archive(path)


# config.properties


def test_model_added_to_config(tmp_path):
    config = tmp_path / "config.properties"
    config.write_text(SERVER_CONFIG.read_text())
    assert add_model(config, name="other", version="2.0")
    text = config.read_text()
    assert not add_model(config, name="other", version="2.0")
    assert config.read_text() == text

    def comments_and_others(lines):
        return [line for line in lines.splitlines() if line.startswith("#") or re.match(r"(?!models|load_m)\w+=", line)]

    before, after = read_properties(SERVER_CONFIG), read_properties(config)
    assert comments_and_others(text) == comments_and_others(SERVER_CONFIG.read_text())
    assert after["load_models"] == "vivit.mar,other.mar" and text.count('"vivit"') == 1
    assert {**after, "models": "", "load_models": ""} == {**before, "models": "", "load_models": ""}
    models = read_models(after)
    assert models["vivit"] == read_models(before)["vivit"]
    assert models["other"]["2.0"] == {**models["vivit"]["1.0"], "marName": "other.mar"}


@pytest.mark.parametrize(
    "text, loaded",
    [
        ("", "m.mar"),
        ("load_models=none\nmodels={}", "m.mar"),
        ("load_models = all\n", "all"),
        ("load_models=all\nload_models=b.mar\n", "b.mar,m.mar"),
        ("load_models=a.mar, m=m.mar\n", "a.mar, m=m.mar"),
        ('load_models=\\\n  a.mar\nmodels={"a": {"1.0": {}}}\nother=1', "a.mar,m.mar"),
    ],
)
def test_model_added_to_other_configs(tmp_path, text, loaded):
    config = tmp_path / "config.properties"
    config.write_text(text)
    assert add_model(config, name="m", version="1.0")
    properties = read_properties(config)
    assert properties["load_models"] == loaded
    assert read_models(properties)["m"]["1.0"]["batchSize"] == 8
    assert ("other" in text) == (properties.get("other") == "1")
    assert not add_model(config, name="m", version="1.0")


def test_new_version_keeps_old_entry(tmp_path):
    config = tmp_path / "config.properties"
    config.write_text('models={"m": {"1.0": {"batchSize": 3, "defaultVersion": true}}}\nload_models=m.mar\n')
    add_model(config, name="m", version="2.0")
    versions = read_models(read_properties(config))["m"]
    assert versions["1.0"] == {"batchSize": 3, "defaultVersion": True}
    assert versions["2.0"]["defaultVersion"] is False


# The commands


def test_build_command(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["build", "--checkpoint", str(checkpoint), "--version", "1.0", "--name"]
    assert main([*arguments, "vivit"]) == 0
    printed = capsys.readouterr()
    assert "built model_store/vivit.mar" in printed.out and "no entry" not in printed.out
    assert all(step in printed.err for step in ("loading", "running the model once", "writing"))

    assert main([*arguments, "other"]) == 0
    printed = capsys.readouterr().out
    assert "has no entry for other 1.0" in printed and '"other": {' in printed
    (tmp_path / "config.properties").write_text(printed.partition("do it:")[2])
    assert read_models(read_properties(tmp_path / "config.properties"))["other"]["1.0"]["batchSize"] == 8

    assert main([*arguments, "third", "--update-config", "config.properties"]) == 0
    assert read_properties(tmp_path / "config.properties")["load_models"] == "vivit.mar,other.mar,third.mar"
    assert main([*arguments, "third"]) == 1
    assert "vivit build: model_store/third.mar exists already" in capsys.readouterr().err


def test_check_command_reports_model(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(check_module, "MINIMUM_TIME_S", 0.0)
    assert main(["check", str(checkpoint), "--device", "cpu"]) == 0
    report = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert report["model"].startswith(
        "attention type spatiotemporal, 2 layers, hidden size 32, 4 heads, tubelets of 2 x 8 x 8"
    )
    assert report["work"] == "0.002392 billion multiply-adds per clip"
    assert report["weights"].endswith("float32, 0.1 MB")
    assert report["labels"].startswith("9: LABEL_0") and "LABEL_8" in report["warning"]
    assert re.match(r"about \d+\.\d GB per worker", report["memory"])
    assert re.match(r"about [\de.+]+ clips/s", report["speed"])
    assert "problem" not in report


def test_check_command_and_archive_of_factorised_encoder(checkpoint, store, tmp_path, capsys, monkeypatch):
    config = VivitConfig.from_pretrained(checkpoint)
    config = dataclasses.replace(config, attention_type="factorised_encoder", tubelet_embedding="uniform_frames")
    VivitForVideoClassification(config).save_pretrained(tmp_path)
    shutil.copy(checkpoint / "preprocessor_config.json", tmp_path)
    monkeypatch.setattr(check_module, "MINIMUM_TIME_S", 0.0)
    assert main(["check", str(tmp_path), "--device", "cpu"]) == 0
    assert (
        "attention type factorised_encoder, 2 layers for each time step and 4 over time, hidden size 32, 4 heads, "
        "patches of 8 x 8 (height x width) of 4 frames"
    ) in capsys.readouterr().out
    archive = build(tmp_path, store)
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "extracted")
    assert VivitForVideoClassification.from_pretrained(tmp_path / "extracted").config == config


def test_check_command_lists_all_problems(damaged, capsys):
    broken = damaged(lambda state: state.pop("classifier.bias"))
    (broken / "preprocessor_config.json").unlink()
    assert main(["check", str(broken)]) == 1
    weights, processor = capsys.readouterr().out.split("\nproblem ")[1:]
    assert "classifier.bias" in weights and "preprocessor_config.json" in processor


def test_check_command_finds_nan_output(damaged, capsys):
    def spoil(state):
        state["classifier.bias"][0] = float("nan")

    assert main(["check", str(damaged(spoil)), "--device", "cpu"]) == 1
    assert "NaN or infinite" in capsys.readouterr().out


def test_version_and_unknown_command(capsys):
    for arguments, status in ((["--version"], 0), ([], 0), (["serv"], 2)):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == status
    printed = capsys.readouterr()
    assert f"vivit {handler.__version__}" in printed.out and "serve a checkpoint" in printed.out
    assert "invalid choice: 'serv'" in printed.err


def test_shipped_timeouts():
    config = yaml.safe_load(MODEL_CONFIG.read_text())
    assert config["responseTimeout"] == config["startupTimeout"] == 300
