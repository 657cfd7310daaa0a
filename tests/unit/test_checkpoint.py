"""Checkpoints: exchange with transformers, names of weights, file formats, and strict loading."""

import functools
import json
import os
import pickle
import shutil
import struct

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from handler import VivitConfig, VivitForVideoClassification, VivitModel
from handler.checkpoints.files import WEIGHTS_FILES, load_state_dict
from handler.checkpoints.hub import CheckpointFileError, CheckpointMismatchError, CheckpointNotFoundError
from handler.checkpoints.names import from_published, to_published
from tests.support import oracle
from tests.support.oracle import TINY

published = functools.lru_cache(oracle.published)  # tests must not change the models


def clip() -> torch.Tensor:
    return torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(1, 4, 3, 32, 32).sin()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A classification checkpoint as saved by transformers; tests must not change it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    published().save_pretrained(directory)
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    """A copy of the checkpoint that a test may change."""
    return shutil.copytree(saved, tmp_path / "checkpoint")


def rewrite(directory, change) -> None:
    """Replaces the weights with the return value of `change`."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})


def assert_loads(directory) -> None:
    """Asserts that a checkpoint holds the weights of the published model."""
    state = VivitForVideoClassification.from_pretrained(directory).state_dict()
    expected = from_published(published().state_dict())
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


# Exchange with transformers


@pytest.mark.parametrize(
    "config", [{}, {"qkv_bias": False, "image_size": (32, 48), "num_labels": 1}], ids=["", "other"]
)
@pytest.mark.parametrize("model_class", [VivitModel, VivitForVideoClassification])
def test_models_are_exchangeable_with_transformers(tmp_path, model_class, config):
    theirs = published(getattr(transformers, model_class.__name__), **config)
    theirs.save_pretrained(tmp_path / "theirs")
    model_class.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    loaded, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)

    assert not any(info.values()), info
    for name, weight in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_saved_file_matches_transformers(saved, tmp_path):
    VivitForVideoClassification.from_pretrained(saved).save_pretrained(tmp_path)

    with (
        safe_open(saved / "model.safetensors", "pt") as theirs,
        safe_open(tmp_path / "model.safetensors", "pt") as ours,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        assert ours.metadata() == theirs.metadata() == {"format": "pt"}
        assert "vivit.encoder.layer.0.attention.attention.query.weight" in ours.keys()  # noqa: SIM118
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["VivitForVideoClassification"]
    loaded = transformers.AutoModelForVideoClassification.from_pretrained(tmp_path)
    assert type(loaded) is transformers.VivitForVideoClassification


def test_loaded_model_ready_for_inference(saved):
    ours = VivitForVideoClassification.from_pretrained(str(saved))

    assert not ours.training
    assert ours.config == VivitConfig(**TINY, num_labels=5)
    assert (ours(clip()).logits - published()(clip()).logits).abs().max() < 1e-4


def test_model_saved_over_its_own_file(directory):
    # The tensors of an open safetensors file are mapped to the file, which is about to be overwritten.
    ours = VivitForVideoClassification.from_pretrained(directory)
    with torch.no_grad():
        ours.classifier.bias.add_(1)
    ours.save_pretrained(directory)

    assert torch.equal(VivitForVideoClassification.from_pretrained(directory)(clip()).logits, ours(clip()).logits)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_saved_files_have_permissions_of_umask(tmp_path, umask, mode):
    former = os.umask(umask)
    try:
        VivitForVideoClassification(VivitConfig(**TINY)).save_pretrained(tmp_path)
    finally:
        os.umask(former)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("config.json", "model.safetensors"), mode
    )


def test_non_contiguous_weights_saved(tmp_path):
    ours = VivitForVideoClassification(VivitConfig(**TINY)).to(memory_format=torch.channels_last_3d)
    ours.save_pretrained(tmp_path)

    loaded = VivitForVideoClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in ours.state_dict().items())


# Namings


IN_MEMORY = {
    "encoder.layer": "layers",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def in_memory(name: str) -> str:
    for old, new in IN_MEMORY.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("naming", [str, in_memory], ids=["published", "transformers 5 in memory"])
@pytest.mark.parametrize("prefix", ["vivit.", ""], ids=["prefix", "no prefix"])
def test_all_namings_are_read(directory, naming, prefix):
    def rename(tensors):
        if naming is in_memory:  # a pooler is dropped
            tensors["vivit.pooler.dense.weight"] = torch.eye(24)
            tensors["vivit.pooler.dense.bias"] = torch.zeros(24)
        return {naming(name.replace("vivit.", prefix)): tensor for name, tensor in tensors.items()}

    rewrite(directory, rename)
    assert_loads(directory)


def test_second_naming_matches_transformers():
    theirs = published(transformers.VivitModel).state_dict()
    ours = VivitModel(VivitConfig(**TINY)).state_dict()

    assert from_published(theirs).keys() == ours.keys()
    assert {in_memory(name) for name in to_published(ours)} == theirs.keys()


@pytest.mark.parametrize("model_class", [VivitModel, VivitForVideoClassification])
def test_conversion_of_names_is_invertible(model_class):
    ours = model_class(VivitConfig(**TINY)).state_dict()
    converted = to_published(ours)
    restored = from_published(converted)

    assert restored.keys() == ours.keys()
    assert all(torch.equal(restored[name], ours[name]) for name in ours)
    assert any(name.endswith("attention.attention.key.weight") for name in converted)


def test_parts_of_fused_tensor_are_views():
    fused = torch.arange(12.0).view(6, 2)
    parts = to_published({"layers.0.attention.qkv.weight": fused})

    assert [part.data_ptr() - fused.data_ptr() for part in parts.values()] == [0, 16, 32]


def test_unknown_names_kept():
    one = torch.ones(1)
    others = {"step": torch.tensor(3), "classifier.scale": one, "layers.0.adapter.weight": one}

    assert to_published(others) == from_published(others) == others


def test_incomplete_fused_tensor():
    names = [f"encoder.layer.3.attention.attention.{part}.bias" for part in ("query", "key")]
    with pytest.raises(CheckpointMismatchError, match=r"encoder.layer.3.attention.attention.value.bias"):
        from_published(dict.fromkeys(names, torch.zeros(2)))


def test_weight_under_two_names_rejected(directory):
    rewrite(directory, lambda tensors: {**tensors, "layernorm.bias": torch.zeros(24)})
    with pytest.raises(CheckpointFileError, match=r"vivit.layernorm.bias occurs twice"):
        load_state_dict(directory)


# The paper's other models


def layer_names(prefix: str, *attentions: str) -> set[str]:
    """Published names of a layer. An attention is "before" or an axis."""
    parts = {"layernorm_after", "intermediate.dense", "output.dense"}
    for axis in attentions:
        parts.add(f"layernorm_{axis}")
        attention = "attention" if axis == "before" else f"attention_{axis}"
        parts |= {f"{attention}.attention.{part}" for part in ("query", "key", "value")}
        parts.add(f"{attention}.output.dense")
    return {f"{prefix}.{part}.{kind}" for part in parts for kind in ("weight", "bias")}


COMMON_NAMES = {
    "vivit.embeddings.position_embeddings",
    *(
        f"{module}.{kind}"
        for module in ("vivit.embeddings.patch_embeddings.projection", "vivit.layernorm", "classifier")
        for kind in ("weight", "bias")
    ),
}
ENCODER_LAYERS = {layer: f"vivit.encoder.layer.{layer}" for layer in (0, 1)}
JOINT_NAMES = COMMON_NAMES.union(*(layer_names(prefix, "before") for prefix in ENCODER_LAYERS.values()))
PUBLISHED_NAMES = {
    "factorised_encoder": JOINT_NAMES
    | layer_names("vivit.temporal_encoder.layer.0", "before")
    | {
        "vivit.embeddings.cls_token",
        "vivit.temporal_embeddings.cls_token",
        "vivit.temporal_embeddings.position_embeddings",
        "vivit.temporal_layernorm.weight",
        "vivit.temporal_layernorm.bias",
    },
    "factorised_self_attention": COMMON_NAMES.union(
        *(layer_names(prefix, "time", "space") for prefix in ENCODER_LAYERS.values())
    ),
    "factorised_dot_product": JOINT_NAMES,
}
OTHER_MODELS = {
    "factorised_encoder": {"attention_type": "factorised_encoder", "num_temporal_layers": 1},
    "factorised_self_attention": {"attention_type": "factorised_self_attention"},
    "factorised_dot_product": {"attention_type": "factorised_dot_product"},
    "mean": {"classifier_pooling": "mean"},
    "uniform_frames": {"tubelet_embedding": "uniform_frames"},
}


def other_model(name: str) -> VivitForVideoClassification:
    torch.manual_seed(0)
    config = VivitConfig(**{**TINY, "num_attention_heads": 4}, num_labels=5, **OTHER_MODELS[name])
    model = VivitForVideoClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_saved_and_loaded(tmp_path, name):
    model = other_model(name)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if name in PUBLISHED_NAMES:
        assert tensors.keys() == PUBLISHED_NAMES[name]
    loaded = VivitForVideoClassification.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(clip()).logits, model(clip()).logits)
    half = VivitForVideoClassification.from_pretrained(tmp_path, torch_dtype="bfloat16")
    assert (half(clip().bfloat16()).logits.float() - model(clip()).logits).abs().max() < 0.1


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_rejected_by_transformers(tmp_path, name):
    other_model(name).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        transformers.VivitForVideoClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, changes, found, wanted",
    [
        ("factorised_encoder", {}, "'factorised_encoder' and classifier_pooling 'cls'", "'spatiotemporal' and .*'cls'"),
        ("factorised_self_attention", {}, "'factorised_self_attention' and .*'mean'", "'spatiotemporal'"),
        ("factorised_dot_product", {}, "'factorised_dot_product', or 'spatiotemporal' and .* 'mean'", "'cls'"),
        ("mean", {"attention_type": "factorised_encoder"}, "'factorised_dot_product', or .*", "'factorised_encoder'"),
        (
            "factorised_encoder",
            {"attention_type": "factorised_encoder", "classifier_pooling": "mean"},
            "'factorised_encoder' and classifier_pooling 'cls'",
            "'factorised_encoder' and classifier_pooling 'mean'",
        ),
    ],
)
def test_weights_of_another_model_rejected_by_name(tmp_path, name, changes, found, wanted):
    other_model(name).save_pretrained(tmp_path)
    config = VivitConfig(**{**TINY, "num_attention_heads": 4}, num_labels=5, **changes)
    message = f"^the weights of .* are those of attention_type {found}, but its configuration has .*{wanted}"
    with pytest.raises(CheckpointMismatchError, match=message):
        VivitForVideoClassification.from_pretrained(tmp_path, config=config)


# Heads


def test_encoder_of_classification_checkpoint(saved):
    ours = VivitModel.from_pretrained(saved)
    outputs = ours(clip())

    expected = published().vivit(clip()).last_hidden_state
    assert (outputs.last_hidden_state - expected).abs().max() < 1e-4
    assert outputs.pooler_output is None


def test_pooler_of_checkpoint(tmp_path):
    theirs = published(transformers.VivitModel)
    theirs.save_pretrained(tmp_path)

    ours = VivitModel.from_pretrained(tmp_path)(clip()).pooler_output
    assert (ours - theirs(clip()).pooler_output).abs().max() < 1e-4
    assert VivitModel.from_pretrained(tmp_path, add_pooling_layer=False)(clip()).pooler_output is None


def test_missing_pooler(directory):
    with pytest.raises(CheckpointMismatchError, match="missing: vivit.pooler.dense.weight"):
        VivitModel.from_pretrained(directory, add_pooling_layer=True)
    rewrite(directory, lambda tensors: {**tensors, "vivit.pooler.dense.weight": torch.zeros(24, 24)})
    with pytest.raises(CheckpointMismatchError, match="missing: vivit.pooler.dense.bias"):
        VivitModel.from_pretrained(directory)


def test_missing_classifier(tmp_path):
    published(transformers.VivitModel).save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatchError) as caught:
        VivitForVideoClassification.from_pretrained(tmp_path)
    assert "missing: classifier.weight" in str(caught.value)
    assert "missing: classifier.bias" in str(caught.value)


def test_new_head_on_trained_encoder(saved):
    ours = VivitForVideoClassification(VivitConfig(**TINY, num_labels=3))
    ours.vivit = VivitModel.from_pretrained(saved, add_pooling_layer=False)

    assert ours.eval()(clip()).logits.shape == (1, 3)
    assert ours.state_dict().keys() == VivitForVideoClassification(ours.config).state_dict().keys()


# Strictness


def test_mismatch_lists_all_problems_by_published_names(directory):
    def damage_all(tensors):
        del tensors["vivit.encoder.layer.1.attention.attention.key.weight"]
        del tensors["vivit.embeddings.cls_token"]
        tensors["vivit.encoder.layer.2.output.dense.bias"] = torch.zeros(24)
        tensors["lm_head.weight"] = torch.zeros(2)
        tensors["classifier.weight"] = torch.zeros(7, 24)
        tensors["vivit.encoder.layer.0.attention.attention.value.bias"] = torch.zeros(25)
        tensors["vivit.layernorm.weight"] = torch.zeros(24, dtype=torch.int8)
        return tensors

    rewrite(directory, damage_all)
    with pytest.raises(CheckpointMismatchError) as caught:
        VivitForVideoClassification.from_pretrained(directory)
    first, *problems = str(caught.value).splitlines()
    assert str(directory) in first
    assert sorted(problem.strip() for problem in problems) == [
        "missing: vivit.embeddings.cls_token",
        "missing: vivit.encoder.layer.1.attention.attention.key.weight",
        "unexpected: lm_head.weight",
        "unexpected: vivit.encoder.layer.2.output.dense.bias",
        "wrong shape: classifier.weight: expected (5, 24), got (7, 24)",
        "wrong shape: vivit.encoder.layer.0.attention.attention.value.bias: expected (24,), got (25,)",
        "wrong type: vivit.layernorm.weight: expected floating point, got torch.int8",
    ]


def test_qkv_biases_without_qkv_bias_are_unexpected(saved):
    config = VivitConfig(**TINY, num_labels=5, qkv_bias=False)
    with pytest.raises(CheckpointMismatchError, match="unexpected: vivit.encoder.*query.bias") as caught:
        VivitForVideoClassification.from_pretrained(saved, config=config)
    assert str(caught.value).count("unexpected") == 6


def test_given_config_replaces_file(directory):
    (directory / "config.json").unlink()
    config = VivitConfig(**TINY, id2label=dict(enumerate("abcde")))

    assert VivitForVideoClassification.from_pretrained(directory, config=config).config is config
    with pytest.raises(CheckpointMismatchError, match=r"classifier.bias: expected \(6,\), got \(5,\)"):
        VivitForVideoClassification.from_pretrained(directory, config=VivitConfig(**TINY, num_labels=6))


def test_unknown_option(saved):
    with pytest.raises(TypeError, match="num_labels"):
        VivitForVideoClassification.from_pretrained(saved, num_labels=6)


# File formats


def test_safetensors_shards(directory):
    published().save_pretrained(directory, max_shard_size="20KB")
    (directory / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(directory.glob("model-*.safetensors"))

    assert len(shards) > 2
    assert_loads(directory)
    for shard in shards[1:3]:
        shard.unlink()
    with pytest.raises(CheckpointNotFoundError, match=f"no {shards[1].name} and no {shards[2].name}"):
        load_state_dict(directory)


def test_pytorch_shards(directory):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"pytorch_model-0000{1 + index % 2}.bin" for index, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        torch.save(part, directory / shard)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    assert_loads(directory)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shard", ["../secret{}", "/etc/secret{}", "..\\secret{}", "sub/secret{}", "..", "", "a.txt"])
def test_index_pointing_outside_checkpoint(saved, tmp_path, shard, suffix):
    shutil.copy(saved / "model.safetensors", tmp_path / f"secret{suffix}")
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    index = {"weight_map": {"classifier.bias": shard.format(suffix)}}
    (directory / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointFileError, match="expected names of files in the same directory"):
        load_state_dict(directory)


@pytest.mark.parametrize("index", ["[", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_invalid_index_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointFileError, match=r"model.safetensors.index.json"):
        load_state_dict(tmp_path)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_pytorch_file(directory, is_zip):
    tensors = load_file(directory / "model.safetensors")
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    (directory / "model.safetensors").unlink()

    assert_loads(directory)


def test_safetensors_preferred_to_pytorch_file(directory):
    (directory / "pytorch_model.bin").write_bytes(b"never opened")

    assert_loads(directory)


def bare_pickle(content, file) -> None:
    pickle.dump(content, file, protocol=2)


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("write", [bare_pickle, torch.save])
def test_code_in_pickle_rejected_and_not_run(tmp_path, write):
    with open(tmp_path / "pytorch_model.bin", "wb") as file:
        write({"classifier.bias": Evil(tmp_path / "pwned")}, file)
    with pytest.raises(CheckpointFileError, match=r"pytorch_model.bin: cannot read it"):
        load_state_dict(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3, "state_dict": {}}, torch.zeros(2), {1: torch.zeros(2)}])
def test_pytorch_file_without_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointFileError, match=r"pytorch_model.bin: expected a dict of tensors by name"):
        load_state_dict(tmp_path)


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def extend_offsets(data: bytes) -> bytes:
    """Makes the header of a safetensors file describe more data than there is."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["classifier.bias"]["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def empty(data: bytes) -> bytes:
    return b""


def overwrite(data: bytes) -> bytes:
    return b"\xff" * 64


@pytest.mark.parametrize(
    "name, damage",
    [
        ("model.safetensors", truncate),
        ("model.safetensors", extend_offsets),
        ("model.safetensors", empty),
        ("model.safetensors", overwrite),
        ("pytorch_model.bin", truncate),
        ("pytorch_model.bin", empty),
        ("pytorch_model.bin", overwrite),
    ],
)
def test_damaged_file_named(saved, tmp_path, name, damage):
    tensors = load_file(saved / "model.safetensors")
    save = save_file if name == "model.safetensors" else torch.save
    save(tensors, tmp_path / name)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(CheckpointFileError, match=f"{name}: cannot read it"):
        load_state_dict(tmp_path)


def test_missing_weights_list_file_names(tmp_path):
    with pytest.raises(CheckpointNotFoundError) as caught:
        load_state_dict(tmp_path)
    assert all(name in str(caught.value) for name in WEIGHTS_FILES)


# Dtype


@pytest.mark.parametrize("option", ["torch_dtype", "dtype"])
def test_dtype(directory, option):
    rewrite(directory, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    for value, expected in (
        (None, torch.float32),
        ("auto", torch.bfloat16),
        (torch.float16, torch.float16),
        ("float16", torch.float16),
        ("torch.float64", torch.float64),
    ):
        ours = VivitForVideoClassification.from_pretrained(directory, **{option: value})
        assert {parameter.dtype for parameter in ours.parameters()} == {expected}
        assert torch.equal(ours.classifier.bias, published().classifier.bias.bfloat16().to(expected))


def test_auto_dtype_is_widest_of_file(directory):
    rewrite(directory, lambda tensors: {**tensors, "classifier.bias": tensors["classifier.bias"].half()})

    assert VivitForVideoClassification.from_pretrained(directory, torch_dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float17", "int8", torch.int8, 16, "nn"])
def test_invalid_dtype(saved, dtype):
    with pytest.raises(ValueError, match=f"dtype must be .*{dtype}"):
        VivitForVideoClassification.from_pretrained(saved, torch_dtype=dtype)


def test_dtype_given_twice(saved):
    with pytest.raises(ValueError, match="both"):
        VivitForVideoClassification.from_pretrained(saved, torch_dtype="float16", dtype="float16")


def test_half_precision_saved_for_transformers(saved, tmp_path):
    VivitForVideoClassification.from_pretrained(saved, dtype="float16").save_pretrained(tmp_path)
    theirs = transformers.VivitForVideoClassification.from_pretrained(tmp_path, dtype="auto")

    assert theirs.dtype == torch.float16
    assert torch.equal(theirs.classifier.weight, published().classifier.weight.half())
