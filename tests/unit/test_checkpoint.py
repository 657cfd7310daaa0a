"""Checkpoints: to and from transformers, in every naming and every kind of file, and what is refused."""

import json
import pickle
import shutil
import struct

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from handler import VivitConfig, VivitForVideoClassification, VivitModel
from handler.checkpoints.files import WEIGHTS_FILES
from handler.checkpoints.hub import CheckpointFileError, CheckpointMismatchError, CheckpointNotFoundError
from handler.checkpoints.names import from_published, to_published

TINY = {
    "image_size": 32,
    "num_frames": 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}


def published(model_class=transformers.VivitForVideoClassification, **own):
    """transformers' model, every parameter random."""
    torch.manual_seed(0)
    theirs = model_class(transformers.VivitConfig(**{**TINY, "num_labels": 5, **own}))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    return theirs.eval()


def clip() -> torch.Tensor:
    return torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(1, 4, 3, 32, 32).sin()


@pytest.fixture
def directory(tmp_path):
    """A classification checkpoint as transformers saves it."""
    published().save_pretrained(tmp_path)
    return tmp_path


def rewritten(directory, change) -> None:
    """Replace the weights by what `change` makes of them."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})


def assert_same_logits(ours, theirs) -> None:
    difference = (ours(clip()).logits - theirs(clip()).logits).abs().max()
    assert difference < 1e-4


# Round trips


@pytest.mark.parametrize("own", [{}, {"qkv_bias": False}, {"image_size": (32, 48), "num_labels": 1}])
@pytest.mark.parametrize("model_class", [VivitModel, VivitForVideoClassification])
def test_what_transformers_saves_we_load_and_what_we_save_it_loads(tmp_path, model_class, own):
    theirs = published(getattr(transformers, model_class.__name__), **own)
    theirs.save_pretrained(tmp_path / "theirs")
    model_class.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)

    assert not any(info.values()), info
    for name, weight in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    assert (tmp_path / "ours" / "model.safetensors").exists()


def test_the_file_has_the_names_and_the_metadata_that_transformers_writes(directory, tmp_path):
    VivitForVideoClassification.from_pretrained(directory).save_pretrained(tmp_path / "ours")

    with safe_open(directory / "model.safetensors", "pt") as theirs:
        with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as ours:
            assert set(ours.keys()) == set(theirs.keys())
            assert ours.metadata() == theirs.metadata() == {"format": "pt"}
            assert "vivit.encoder.layer.0.attention.attention.query.weight" in ours.keys()
            for name in theirs.keys():
                assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name)), name
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["architectures"] == ["VivitForVideoClassification"]


def test_an_auto_class_of_transformers_recognises_what_we_save(tmp_path):
    VivitForVideoClassification(VivitConfig(**TINY)).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForVideoClassification.from_pretrained(tmp_path)

    assert type(loaded) is transformers.VivitForVideoClassification


def test_a_loaded_model_is_ready_to_evaluate(directory):
    ours = VivitForVideoClassification.from_pretrained(str(directory))

    assert not ours.training
    assert ours.config == VivitConfig(**TINY, num_labels=5)
    assert_same_logits(ours, published())


def test_a_loaded_model_can_be_saved_where_it_came_from(directory):
    """The tensors of a safetensors file are a map of the file: overwriting it must not pull the rug away."""
    ours = VivitForVideoClassification.from_pretrained(directory)
    with torch.no_grad():
        ours.classifier.bias.add_(1)
    ours.save_pretrained(directory)

    assert torch.equal(VivitForVideoClassification.from_pretrained(directory)(clip()).logits, ours(clip()).logits)


def test_weights_that_are_not_contiguous_are_saved_as_well(tmp_path):
    ours = VivitForVideoClassification(VivitConfig(**TINY)).to(memory_format=torch.channels_last_3d).eval()
    ours.save_pretrained(tmp_path)

    assert torch.allclose(
        VivitForVideoClassification.from_pretrained(tmp_path)(clip()).logits, ours(clip()).logits, atol=1e-6
    )


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
@pytest.mark.parametrize("pooler", [True, False], ids=["pooler", "no pooler"])
def test_every_naming_in_the_wild_is_read(directory, naming, prefix, pooler):
    def rename(tensors):
        if pooler:
            tensors["vivit.pooler.dense.weight"] = torch.eye(24)
            tensors["vivit.pooler.dense.bias"] = torch.zeros(24)
        return {naming(name.replace("vivit.", prefix)): tensor for name, tensor in tensors.items()}

    rewritten(directory, rename)
    assert_same_logits(VivitForVideoClassification.from_pretrained(directory), published())


def test_our_second_naming_is_the_one_that_transformers_has_in_memory():
    theirs = published(transformers.VivitModel).state_dict()
    ours = VivitModel(VivitConfig(**TINY)).state_dict()

    assert from_published(theirs).keys() == ours.keys()
    assert {in_memory(name) for name in to_published(ours)} == theirs.keys()


@pytest.mark.parametrize("model_class", [VivitModel, VivitForVideoClassification])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_to_published_and_from_published_are_inverse(model_class, qkv_bias):
    ours = model_class(VivitConfig(**TINY, qkv_bias=qkv_bias)).state_dict()
    there = to_published(ours)
    back = from_published(there)

    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    assert any(name.endswith("attention.attention.key.weight") for name in there)


def test_the_three_parts_of_a_fused_tensor_are_views_of_it():
    """Saving copies nothing that it need not copy."""
    fused = torch.arange(12.0).view(6, 2)
    parts = to_published({"layers.0.attention.qkv.weight": fused})

    assert [part.data_ptr() - fused.data_ptr() for part in parts.values()] == [0, 16, 32]


def test_names_that_are_not_in_the_table_are_left_alone():
    one = torch.ones(1)
    others = {"step": torch.tensor(3), "classifier.scale": one, "layers.0.adapter.weight": one}

    assert to_published(others) == from_published(others) == others


def test_half_of_a_fused_tensor_is_no_tensor():
    with pytest.raises(CheckpointMismatchError, match="encoder.layer.3.attention.attention.value.bias"):
        from_published(
            {
                "encoder.layer.3.attention.attention.query.bias": torch.zeros(2),
                "encoder.layer.3.attention.attention.key.bias": torch.zeros(2),
            }
        )


def test_one_weight_under_two_names_is_refused(directory):
    rewritten(directory, lambda tensors: {**tensors, "layernorm.bias": torch.zeros(24)})
    with pytest.raises(CheckpointFileError, match="vivit.layernorm.bias occurs twice"):
        VivitForVideoClassification.from_pretrained(directory)


# The encoder of a classification checkpoint, and other heads


def test_the_encoder_of_a_classification_checkpoint_can_be_had(directory):
    """The documented `VivitModel.from_pretrained("google/vivit-b-16x2-kinetics400")`."""
    ours = VivitModel.from_pretrained(directory)
    outputs = ours(clip())

    expected = published().vivit(clip()).last_hidden_state
    assert (outputs.last_hidden_state - expected).abs().max() < 1e-4
    assert outputs.pooler_output is None  # the checkpoint has no weights for it


def test_a_pooler_is_there_when_the_checkpoint_has_one(tmp_path):
    theirs = published(transformers.VivitModel)
    theirs.save_pretrained(tmp_path)

    ours = VivitModel.from_pretrained(tmp_path)(clip()).pooler_output
    assert (ours - theirs(clip()).pooler_output).abs().max() < 1e-4
    assert VivitModel.from_pretrained(tmp_path, add_pooling_layer=False)(clip()).pooler_output is None


def test_a_pooler_that_is_asked_for_and_not_there_is_missing(directory):
    with pytest.raises(CheckpointMismatchError, match="missing: vivit.pooler.dense.weight"):
        VivitModel.from_pretrained(directory, add_pooling_layer=True)


def test_half_a_pooler_is_missing_the_other_half(directory):
    rewritten(directory, lambda tensors: {**tensors, "vivit.pooler.dense.weight": torch.zeros(24, 24)})
    with pytest.raises(CheckpointMismatchError, match="missing: vivit.pooler.dense.bias"):
        VivitModel.from_pretrained(directory)


def test_a_checkpoint_without_a_classifier_classifies_nothing(tmp_path):
    published(transformers.VivitModel).save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatchError) as caught:
        VivitForVideoClassification.from_pretrained(tmp_path)
    assert "missing: classifier.weight" in str(caught.value)
    assert "missing: classifier.bias" in str(caught.value)


def test_a_new_head_is_put_on_a_trained_encoder_by_assignment(directory):
    """What from_pretrained's documentation tells for fine-tuning."""
    ours = VivitForVideoClassification(VivitConfig(**TINY, num_labels=3))
    ours.vivit = VivitModel.from_pretrained(directory, add_pooling_layer=False)

    assert ours.eval()(clip()).logits.shape == (1, 3)
    assert ours.state_dict().keys() == VivitForVideoClassification(ours.config).state_dict().keys()


# Strictness


def test_one_error_lists_everything_under_published_names(directory):
    def spoil(tensors):
        del tensors["vivit.encoder.layer.1.attention.attention.key.weight"]
        del tensors["vivit.embeddings.cls_token"]
        tensors["vivit.encoder.layer.2.output.dense.bias"] = torch.zeros(24)
        tensors["lm_head.weight"] = torch.zeros(2)
        tensors["classifier.weight"] = torch.zeros(7, 24)
        tensors["vivit.encoder.layer.0.attention.attention.value.bias"] = torch.zeros(25)
        tensors["vivit.layernorm.weight"] = torch.zeros(24, dtype=torch.int8)
        return tensors

    rewritten(directory, spoil)
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


def test_biases_that_the_configuration_denies_are_unexpected(directory):
    own = VivitConfig(**TINY, num_labels=5, qkv_bias=False)
    with pytest.raises(CheckpointMismatchError, match="unexpected: vivit.encoder.*query.bias") as caught:
        VivitForVideoClassification.from_pretrained(directory, config=own)
    assert str(caught.value).count("unexpected") == 6


def test_a_given_configuration_takes_the_place_of_the_file(directory):
    (directory / "config.json").unlink()
    own = VivitConfig(**TINY, id2label=dict(enumerate("abcde")))

    assert VivitForVideoClassification.from_pretrained(directory, config=own).config is own
    with pytest.raises(CheckpointMismatchError, match=r"classifier.bias: expected \(6,\), got \(5,\)"):
        VivitForVideoClassification.from_pretrained(directory, config=VivitConfig(**TINY, num_labels=6))


def test_an_option_that_does_not_exist_is_refused(directory):
    with pytest.raises(TypeError, match="num_labels"):
        VivitForVideoClassification.from_pretrained(directory, num_labels=6)


# Kinds of files


def test_shards_are_read_by_their_index(directory):
    theirs = published()
    theirs.save_pretrained(directory, max_shard_size="20KB")
    (directory / "model.safetensors").unlink(missing_ok=True)

    assert len(list(directory.glob("model-*.safetensors"))) > 2
    assert_same_logits(VivitForVideoClassification.from_pretrained(directory), theirs)


def test_missing_shards_are_all_listed(directory):
    (directory / "model.safetensors").unlink()
    published().save_pretrained(directory, max_shard_size="20KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    for shard in shards[1:3]:
        shard.unlink()
    with pytest.raises(CheckpointNotFoundError, match=f"no {shards[1].name} and no {shards[2].name}"):
        VivitForVideoClassification.from_pretrained(directory)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shard", ["../secret{}", "/etc/secret{}", "..\\secret{}", "sub/secret{}", "..", "", "a.txt"])
def test_an_index_that_leads_elsewhere_is_refused(directory, shard, suffix):
    target = directory.parent / f"secret{suffix}"
    shutil.copy(directory / "model.safetensors", target)
    (directory / "model.safetensors").unlink()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    index = {"weight_map": {"classifier.bias": shard.format(suffix)}}
    (directory / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointFileError, match="expected names of files in the same directory"):
        VivitForVideoClassification.from_pretrained(directory)


@pytest.mark.parametrize("index", ["[", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(directory, index):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointFileError, match="model.safetensors.index.json"):
        VivitForVideoClassification.from_pretrained(directory)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pytorch_file_is_read(directory, zipped):
    tensors = load_file(directory / "model.safetensors")
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (directory / "model.safetensors").unlink()

    assert_same_logits(VivitForVideoClassification.from_pretrained(directory), published())


def test_pytorch_shards_are_read_by_their_index(directory):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"pytorch_model-0000{1 + index % 2}.bin" for index, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        torch.save(part, directory / shard)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    assert_same_logits(VivitForVideoClassification.from_pretrained(directory), published())


def test_safetensors_are_preferred_to_a_pytorch_file(directory):
    (directory / "pytorch_model.bin").write_bytes(b"never opened")

    assert_same_logits(VivitForVideoClassification.from_pretrained(directory), published())


def bare_pickle(content, file) -> None:
    pickle.dump(content, file, protocol=2)


class Evil:
    """To unpickle it is to write a file."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("write", [bare_pickle, torch.save])
def test_a_pickle_that_runs_code_is_refused_and_not_run(directory, tmp_path, write):
    (directory / "model.safetensors").unlink()
    with open(directory / "pytorch_model.bin", "wb") as file:
        write({"classifier.bias": Evil(tmp_path / "pwned")}, file)
    with pytest.raises(CheckpointFileError, match="pytorch_model.bin: cannot read it"):
        VivitForVideoClassification.from_pretrained(directory)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3, "state_dict": {}}, torch.zeros(2), {1: torch.zeros(2)}])
def test_a_pytorch_file_of_something_else_is_told(directory, content):
    (directory / "model.safetensors").unlink()
    torch.save(content, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointFileError, match="pytorch_model.bin: expected a dict of tensors by name"):
        VivitForVideoClassification.from_pretrained(directory)


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def with_other_offsets(data: bytes) -> bytes:
    """A header that promises more than the file has."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["classifier.bias"]["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def emptied(data: bytes) -> bytes:
    return b""


def garbled(data: bytes) -> bytes:
    return b"\xff" * 64


@pytest.mark.parametrize(
    "name, damage",
    [
        ("model.safetensors", truncated),
        ("model.safetensors", with_other_offsets),
        ("model.safetensors", emptied),
        ("model.safetensors", garbled),
        ("pytorch_model.bin", truncated),
        ("pytorch_model.bin", emptied),
        ("pytorch_model.bin", garbled),
    ],
)
def test_a_damaged_file_is_named(directory, name, damage):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    data = (directory / name).read_bytes()
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(damage(data))
    with pytest.raises(CheckpointFileError, match=f"{name}: cannot read it"):
        VivitForVideoClassification.from_pretrained(directory)


def test_a_directory_without_weights_lists_what_was_looked_for(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError) as caught:
        VivitForVideoClassification.from_pretrained(directory)
    for name in WEIGHTS_FILES:
        assert name in str(caught.value)


# dtype


@pytest.mark.parametrize("option", ["torch_dtype", "dtype"])
@pytest.mark.parametrize(
    "asked, expected",
    [
        (None, torch.float32),
        ("auto", torch.bfloat16),
        (torch.float16, torch.float16),
        ("float16", torch.float16),
        ("torch.float64", torch.float64),
    ],
)
def test_the_dtype_is_float32_unless_it_is_asked_for(directory, option, asked, expected):
    rewritten(directory, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    ours = VivitForVideoClassification.from_pretrained(directory, **{option: asked})

    assert {parameter.dtype for parameter in ours.parameters()} == {expected}
    assert torch.equal(ours.classifier.bias, published().classifier.bias.bfloat16().to(expected))


def test_auto_is_the_widest_of_a_mixed_file(directory):
    rewritten(directory, lambda tensors: {**tensors, "classifier.bias": tensors["classifier.bias"].half()})

    assert VivitForVideoClassification.from_pretrained(directory, torch_dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float17", "int8", torch.int8, 16, "nn"])
def test_another_dtype_is_refused(directory, dtype):
    with pytest.raises(ValueError, match="floating point dtype such as 'float16'"):
        VivitForVideoClassification.from_pretrained(directory, torch_dtype=dtype)


def test_both_names_of_the_dtype_at_once_are_refused(directory):
    with pytest.raises(ValueError, match="two names of one option"):
        VivitForVideoClassification.from_pretrained(directory, torch_dtype="float16", dtype="float16")


def test_a_half_precision_model_is_saved_as_such_and_transformers_loads_it(directory, tmp_path):
    VivitForVideoClassification.from_pretrained(directory, dtype="float16").save_pretrained(tmp_path / "half")
    theirs = transformers.VivitForVideoClassification.from_pretrained(tmp_path / "half", dtype="auto")

    assert theirs.dtype == torch.float16
    assert torch.equal(theirs.classifier.weight, published().classifier.weight.half())
