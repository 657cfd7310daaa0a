"""Conversion of the original's checkpoints. The oracle is the original's code, which made tests/data/scenic."""

import random
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

from handler import VideoClassifier, VivitForVideoClassification, VivitImageProcessor
from handler.checkpoints import scenic
from handler.checkpoints.flax import find_checkpoint, load_parameters
from handler.checkpoints.hub import (
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from handler.cli import convert
from handler.models.config import VivitConfig
from tests.support import numpy_vivit

DATA = Path(__file__).parents[1] / "data" / "scenic"
EXPECTED = np.load(DATA / "expected.npz")
CLIPS = EXPECTED["clips"].transpose(0, 1, 4, 2, 3)  # uint8 (B, T, C, H, W)
# What the checkpoints do not state.
OPTIONS = {
    "spatiotemporal_cls": {},
    "spatiotemporal_mean": {"attention_type": "spatiotemporal"},
    "spatiotemporal_uniform_frames": {},
    "factorised_encoder_cls": {},
    "factorised_encoder_mean": {},
    "factorised_encoder_uniform_frames": {},
    "factorised_self_attention_time_space": {},
    "factorised_self_attention_space_time": {"attention_order": "space_time"},
    "factorised_dot_product": {"attention_type": "factorised_dot_product"},
}
SIZE = {"image_size": 16, "num_frames": 8}
JOINT, FACTORISED = "spatiotemporal_cls", "factorised_encoder_cls"


def flags(**options) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def run(checkpoint, out, *arguments, **options) -> int:
    return convert.main([str(checkpoint), "--out", str(out), *arguments, *flags(**options)])


def load(name: str) -> dict[str, np.ndarray]:
    return load_parameters(DATA / name)


def renamed(parameters, old: str, new: str) -> dict[str, np.ndarray]:
    return {name.replace(old, new): array for name, array in parameters.items()}


def without(parameters, part: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in parameters.items() if part not in name}


def tree(name: str):
    """The content of a checkpoint; arrays are msgpack.ExtType."""
    return msgpack.unpackb((DATA / name).read_bytes(), strict_map_key=False)


def array(shape, content: bytes, dtype: str = "float32") -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))


# Logits


@pytest.mark.parametrize("name", OPTIONS)
def test_numpy_models_match_original(name):
    fields, tensors = scenic.convert(load(name), **SIZE, **OPTIONS[name])
    config = VivitConfig(**fields)
    logits = [numpy_vivit.logits(config, tensors, clip) for clip in CLIPS / 127.5 - 1]
    np.testing.assert_allclose(logits, EXPECTED[name], atol=5e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_converted_models_match_original(name, tmp_path):
    assert run(DATA / name, tmp_path / "out", **SIZE, **OPTIONS[name]) == 0
    model = VivitForVideoClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model(torch.from_numpy(CLIPS / 127.5 - 1).float()).logits
    np.testing.assert_allclose(logits, EXPECTED[name], atol=1e-5)


@pytest.mark.parametrize("name", [JOINT, "factorised_dot_product"])
def test_classifier_normalizes_like_original(name, tmp_path):
    run(DATA / name, tmp_path, **SIZE, **OPTIONS[name])
    classifier = VideoClassifier.from_pretrained(tmp_path, device="cpu")
    np.testing.assert_allclose(classifier.logits(list(CLIPS[:, None])), EXPECTED[name], atol=1e-4)


def test_models_without_attention_biases(tmp_path):
    parameters = {
        name: array
        for name, array in load(FACTORISED).items()
        if "DotProductAttention" not in name or name.endswith("kernel")
    }
    fields, tensors = scenic.convert(parameters)
    config = VivitConfig(**fields)
    model = convert.make_model(config, tensors, source="")
    with torch.no_grad():
        logits = model(torch.from_numpy(CLIPS[:1] / 127.5 - 1).float()).logits[0]
    assert not config.qkv_bias
    np.testing.assert_allclose(logits, numpy_vivit.logits(config, tensors, CLIPS[0] / 127.5 - 1), atol=1e-5)


# Files


@pytest.mark.parametrize(
    "layout",
    [
        lambda parameters: {"params": parameters},
        lambda parameters: {"params": {"params": parameters}},
        lambda parameters: {"optimizer": {"target": parameters, "state": {"0": None}}, "rng": [1, 2]},
        lambda parameters: {"ema_params": {"embedding": 1}, "optimizer": {"target": {"params": parameters}}},
    ],
)
def test_layouts_of_files(layout, tmp_path):
    path = tmp_path / "checkpoint"
    path.write_bytes(msgpack.packb(layout(tree(JOINT)["optimizer"]["target"])))
    parameters, expected = load_parameters(path), load(JOINT)
    assert parameters.keys() == expected.keys()
    assert all(np.array_equal(parameters[name], expected[name]) for name in expected)


def test_corrupt_files_rejected(tmp_path):
    """Corruption leads to other values or to an error of ours, never to another exception."""
    content, path = (DATA / "factorised_encoder_mean").read_bytes(), tmp_path / "checkpoint"
    draw = random.Random(0)
    for length in [0, 1, 2, *range(100, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointFileError):
            load_parameters(path)
    for _ in range(100):
        corrupt = bytearray(content)
        for _ in range(draw.choice([1, 3, 30])):
            corrupt[draw.randrange(len(corrupt))] = draw.randrange(256)
        path.write_bytes(corrupt)
        try:
            scenic.convert(load_parameters(path))
        except CheckpointError as error:
            assert len(str(error)) < 3000


DEEP = b"\x81\xa1a" * 3000
PARAMS = b"\x81\xa6params"


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "corrupt"),
        (b"PK\x03\x04 not msgpack", "corrupt"),
        (msgpack.packb([1, 2]), "corrupt"),
        (msgpack.packb({"weights": 1}), "neither"),
        (msgpack.packb({"params": 1}), "neither"),
        (msgpack.packb({"params": {"a": 1.5}}), "'a' to be an array"),
        (msgpack.packb({"params": {}}) + b"\x00", "1 more bytes"),
        (msgpack.packb({"params": {"a": array([2, 2], bytes(12))}}), "'a' to be an array"),
        (msgpack.packb({"params": {"a": array([-1], bytes(12))}}), "the length -1"),
        (msgpack.packb({"params": {"a": array([2**40, 2**40], b"")}}), "'a' to be an array"),
        (msgpack.packb({"params": {"a": array([1], bytes(8), "object")}}), "the type 'object'"),
        (msgpack.packb({"params": {"a": msgpack.ExtType(1, b"\xc1")}}), "'a' to be an array"),
        (msgpack.packb({"params": {"a": {"__msgpack_chunked_array__": True}}}), "'a' to be an array"),
        (PARAMS + b"\xdd\x01\x00\x00\x00", "max_array_len"),
        (PARAMS + b"\xdf\xff\xff\xff\xff", "corrupt"),
        (PARAMS + b"\xc9\x7f\xff\xff\xff\x01", "corrupt"),
        (PARAMS + DEEP, "corrupt"),
        (PARAMS + b"\x81\xa1a" * 900 + b"\x80", "no Transformer"),
    ],
)
def test_other_files_rejected(content, reason, tmp_path):
    path = tmp_path / "checkpoint"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        scenic.convert(load_parameters(path))


def test_newest_checkpoint_of_folder(tmp_path, capsys):
    for name in ("checkpoint_9", "checkpoint_100", "checkpoint_tmp", "checkpoint"):
        (tmp_path / name).write_bytes(b"")
    assert find_checkpoint(tmp_path).name == "checkpoint_100"
    assert run(tmp_path, tmp_path / "out") == 1 and "checkpoint_100" in capsys.readouterr().err
    for step in (9, 100):
        (tmp_path / f"checkpoint_{step}").unlink()
    assert find_checkpoint(tmp_path).name == "checkpoint"


def test_missing_and_orbax_checkpoints_rejected(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="no file or folder"):
        find_checkpoint(tmp_path / "x")
    with pytest.raises(CheckpointNotFoundError, match="neither"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoint_3").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="Orbax"):
        find_checkpoint(tmp_path)


def test_missing_msgpack_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(CheckpointError, match="pip install msgpack"):
        load(JOINT)


# What the checkpoint does not state


def test_size_read_from_positions():
    assert scenic.convert(load(FACTORISED)).config.items() >= {**SIZE, "tubelet_size": (2, 8, 4)}.items()
    assert scenic.convert(load(JOINT), num_frames=8).config["image_size"] == 16
    assert scenic.convert(load(JOINT), image_size=16).config["num_frames"] == 8


@pytest.mark.parametrize(
    "name, size, message",
    [
        (JOINT, {}, "32 tubelets of 2x8x4, but 32 frames of 224x224 .* fits: --image-size 32 --num-frames 2"),
        (JOINT, {"image_size": 24}, "3x6 tubelets"),
        (JOINT, {"image_size": 16, "num_frames": 12}, "in each of 6 time steps.*--image-size 16 --num-frames 8"),
        (JOINT, {"image_size": 20}, "2.5x5 tubelets"),
        (FACTORISED, {"image_size": 32}, "8 tubelets of 2x8x4 in each of 4 time steps"),
        ("spatiotemporal_uniform_frames", {"image_size": 16, "num_frames": 6}, "32 tubelets of 8x4.*divide 6"),
    ],
)
def test_sizes_that_do_not_fit_rejected(name, size, message):
    with pytest.raises(CheckpointMismatchError, match=message):
        scenic.convert(load(name), **size)


def test_published_size_is_default():
    parameters = load(JOINT)
    parameters["embedding/kernel"] = np.zeros((2, 16, 16, 3, 16), np.float32)
    parameters["Transformer/posembed_input/pos_embedding"] = np.zeros((1, 3137, 16), np.float32)
    fields = scenic.convert(parameters).config
    assert (fields["image_size"], fields["num_frames"], fields["tubelet_size"]) == (224, 32, (2, 16, 16))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("factorised_dot_product", {}, "spatiotemporal and factorised_dot_product.*--attention-type"),
        ("factorised_dot_product", {"attention_type": "factorised_encoder"}, "expected the attention type"),
        (JOINT, {"attention_type": "factorised_dot_product"}, "expected the attention type spatiotemporal"),
    ],
)
def test_attention_type_checked(name, options, message):
    with pytest.raises(CheckpointMismatchError, match=message):
        scenic.convert(load(name), **SIZE, **options)


def test_unsupported_models_rejected():
    joint, factorised = load(JOINT), load(FACTORISED)
    unsupported = {
        "pre_logits": {**joint, "pre_logits/kernel": np.zeros((16, 16), np.float32)},
        "spatial_only_baseline": without(factorised, "TemporalTransformer"),
        "sinusoidal": without(joint, "posembed_input"),
        "no classifier": without(joint, "output_projection"),
        "no Transformer/encoderblock_0": without(joint, "encoderblock"),
        "no embedding/kernel": without(joint, "embedding/kernel"),
        "embedding/kernel of 4 or 5": {**joint, "embedding/kernel": np.zeros((2, 0, 4, 3, 16), np.float32)},
        "has twice: cls_SpatialTransformer": {**joint, "cls_SpatialTransformer": joint["cls"]},
        "as many heads": {
            name: array.reshape(16, 4, 4) if name.startswith("Temporal") and "query/kernel" in name else array
            for name, array in factorised.items()
        },
        "no ViViT has.*: map_head/probe": {**joint, "map_head/probe": np.zeros((1, 1, 16), np.float32)},
        "no ViViT has.*: Transformer/encoderblock_0/Mixer": renamed(joint, "_0/LayerNorm_1", "_0/Mixer_1"),
        "3 axes": {**joint, "Transformer/encoderblock_1/MultiHeadDotProductAttention_0/key/kernel": np.zeros((16, 16))},
    }
    for message, parameters in unsupported.items():
        with pytest.raises(CheckpointMismatchError, match=message):
            scenic.convert(parameters, **SIZE)


def test_image_models_rejected():
    parameters = load("spatiotemporal_uniform_frames")
    parameters["Transformer/posembed_input/pos_embedding"] = np.zeros((1, 9, 16), np.float32)
    with pytest.raises(CheckpointMismatchError, match="position embeddings for 8 tubelets"):
        scenic.convert(parameters, **SIZE)


def test_missing_and_misshapen_weights_named():
    parameters = without(load(JOINT), "encoderblock_1/LayerNorm_1/bias")
    parameters["output_projection/bias"] = np.zeros(4, np.float32)
    fields, tensors = scenic.convert(parameters, **SIZE)
    with pytest.raises(CheckpointMismatchError) as error:
        convert.make_model(VivitConfig(**fields), tensors, source="x")
    for problem in ("missing: vivit.encoder.layer.1.layernorm_after.bias", r"classifier.bias: expected (5,), got (4,)"):
        assert problem in str(error.value)


# Labels and the directory


def test_labels_and_heads(tmp_path, capsys):
    (tmp_path / "nouns").write_text("pan\npeel\n")
    (tmp_path / "verbs").write_text("take\npeel\nwash\n")
    (tmp_path / "all").write_text("a\nb\nc\nd\ne\n")
    named = f"noun={tmp_path / 'nouns'},verb={tmp_path / 'verbs'}"
    expected = {
        (): [f"LABEL_{index}" for index in range(5)],
        ("--labels", str(tmp_path / "all")): ["a", "b", "c", "d", "e"],
        ("--heads", "noun=2,verb=3"): ["noun_0", "noun_1", "verb_0", "verb_1", "verb_2"],
        ("--heads", "noun=2,verb=3", "--labels", named): ["pan", "peel", "take", "peel", "wash"],
    }
    for arguments, labels in expected.items():
        assert run(DATA / JOINT, tmp_path / "out", "--force", *arguments, **SIZE) == 0
        config = VivitConfig.from_pretrained(tmp_path / "out")
        assert list(config.id2label.values()) == labels
        assert config.label_heads == ({"noun": 2, "verb": 3} if "--heads" in arguments else None)
    capsys.readouterr()
    for arguments, message in {
        ("--heads", "noun=2,verb=2"): "has 5 outputs, but --heads has 4",
        ("--labels", "kinetics400"): "has 5 outputs, but --labels names 400",
        ("--heads", "noun=3,verb=2", "--labels", named): "noun has 3 labels",
        ("--heads", "noun=2,verb=3", "--labels", "noun=x"): "each of the heads noun, verb",
    }.items():
        assert run(DATA / JOINT, tmp_path / "other", *arguments, **SIZE) == 1
        assert message in capsys.readouterr().err


def test_attention_order_has_no_effect_on_other_models(tmp_path, capsys):
    assert run(DATA / "factorised_encoder_mean", tmp_path, "--attention-order", "space_time") == 0
    assert "--attention-order has no effect" in capsys.readouterr().out


def test_directory_replaced_only_with_force_and_never_in_part(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "out"
    assert run(DATA / FACTORISED, out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.keys() == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert list(out.parent.iterdir()) == [out]

    assert run(DATA / "factorised_encoder_mean", out) == 1 and "--force" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(VivitImageProcessor, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        assert run(DATA / "factorised_encoder_mean", out, "--force") == 1 and "disk full" in capsys.readouterr().err
        assert run(DATA / FACTORISED, tmp_path / "other") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not (tmp_path / "other").exists() and list(out.parent.iterdir()) == [out]

    (out / "notes.txt").write_text("mine")
    assert run(DATA / "factorised_encoder_mean", out, "--force") == 0
    assert VivitConfig.from_pretrained(out).classifier_pooling == "mean" and (out / "notes.txt").exists()


@pytest.mark.parametrize("image_size, shorter_side", [(224, 256), (256, 288), (112, 128)])
def test_frames_processed_as_in_evaluation_of_original(image_size, shorter_side):
    processor = convert.make_image_processor(VivitConfig(image_size=image_size))
    assert dict(processor.size) == {"shortest_edge": shorter_side}
    assert processor.resize_crop.output_size(480, 640) == (image_size, image_size)
    assert VivitImageProcessor.from_dict(processor.to_dict()) == processor and not processor.antialias
    scale, bias = processor.scale_and_bias()
    np.testing.assert_allclose([bias, 255 * scale + bias], [[-1] * 3, [1] * 3], atol=1e-6)
