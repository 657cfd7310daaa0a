"""VivitConfig: the published fields and defaults, what it refuses, config.json to and from transformers."""

import dataclasses
import json

import pytest
import transformers

from handler import VivitConfig
from handler.checkpoints.hub import CheckpointFileError, CheckpointNotFoundError
from handler.models.config import ConfigError

# As google/vivit-b-16x2-kinetics400 has had it since 2023: a removed field, and keys of transformers' own.
HUB_CONFIG = {
    "_name_or_path": "google/vivit-b-16x2-kinetics400",
    "architectures": ["VivitForVideoClassification"],
    "hidden_act": "gelu_fast",
    "hidden_size": 768,
    "id2label": {str(index): f"LABEL_{index}" for index in range(400)},
    "image_size": 224,
    "label2id": {f"LABEL_{index}": index for index in range(400)},
    "layer_norm_eps": 1e-06,
    "model_type": "vivit",
    "torch_dtype": "float32",
    "transformers_version": "4.32.0.dev0",
    "tubelet_size": [2, 16, 16],
    "video_size": [32, 224, 224],
}


def test_fields_and_defaults_are_the_published_ones():
    published = transformers.VivitConfig()
    for field in dataclasses.fields(VivitConfig):
        assert getattr(VivitConfig(), field.name) == getattr(published, field.name), field.name


def test_every_field_that_transformers_declares_for_vivit_is_there():
    common = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    published = {field.name for field in dataclasses.fields(transformers.VivitConfig)} - common

    assert published <= {field.name for field in dataclasses.fields(VivitConfig)}


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VivitConfig().hidden_size = 12


def test_a_pair_is_height_and_width():
    config = VivitConfig(image_size=[64, 96], num_frames=8, tubelet_size=[4, 16, 32])

    assert (config.image_height, config.image_width) == (64, 96)
    assert config.grid == (2, 4, 3)
    assert config.num_patches == 24


def test_the_base_model_has_3136_tubelets():
    assert VivitConfig().grid == (16, 14, 14)
    assert VivitConfig().num_patches == 3136


def test_the_pooler_is_as_wide_as_a_token_unless_it_is_told():
    assert VivitConfig(hidden_size=24).pooler_output_size == 24
    assert VivitConfig(pooler_output_size=10).pooler_output_size == 10


@pytest.mark.parametrize(
    "field, value, rule",
    [
        ("image_size", 0, "1 or more"),
        ("image_size", "224", "a whole number"),
        ("image_size", (224,), "(height, width)"),
        ("image_size", (224, 224.0), "whole numbers (height, width)"),
        ("image_size", 225, "multiple of the tubelet's 16x16 pixels"),
        ("image_size", (224, 225), "multiple of the tubelet's 16x16 pixels"),
        ("num_frames", 31, "multiple of the tubelet's 2 frames"),
        ("num_frames", 32.0, "whole number"),
        ("num_frames", True, "whole number"),
        ("tubelet_size", (2, 16), "(frames, height, width)"),
        ("tubelet_size", (2, 16, -16), "1 or more"),
        ("tubelet_size", 16, "(frames, height, width)"),
        ("num_channels", -3, "1 or more"),
        ("hidden_size", None, "whole number"),
        ("hidden_size", 770, "multiple of num_attention_heads, 12"),
        ("num_hidden_layers", 0, "1 or more"),
        ("num_attention_heads", 0, "1 or more"),
        ("intermediate_size", -1, "1 or more"),
        ("pooler_output_size", 0, "1 or more"),
        ("hidden_act", "gelu_fsat", "gelu_fast"),
        ("hidden_act", None, "gelu_fast"),
        ("pooler_act", ["tanh"], "tanh"),
        ("hidden_dropout_prob", 1.5, "from 0 to 1"),
        ("hidden_dropout_prob", "0.1", "from 0 to 1"),
        ("attention_probs_dropout_prob", -0.1, "from 0 to 1"),
        ("attention_probs_dropout_prob", float("nan"), "from 0 to 1"),
        ("initializer_range", -0.02, "0 or more"),
        ("initializer_range", float("inf"), "0 or more"),
        ("layer_norm_eps", 0, "more than 0"),
        ("qkv_bias", 1, "true or false"),
        ("problem_type", "classification", "single_label_classification"),
        ("num_labels", 0, "1 or more"),
        ("num_labels", "2", "whole number"),
    ],
)
def test_a_broken_rule_is_told_with_field_value_and_rule(field, value, rule):
    with pytest.raises(ConfigError) as caught:
        VivitConfig(**{field: value})
    for part in (field, repr(value), rule):
        assert part in str(caught.value)


def test_an_unknown_field_is_refused_where_it_is_written_by_hand():
    with pytest.raises(TypeError, match="hiden_size"):
        VivitConfig(hiden_size=768)


def test_labels_are_derived_from_any_one_of_the_three():
    names = {0: "jump", 1: "run", 2: "sit"}
    for config in (VivitConfig(id2label=names), VivitConfig(label2id={"sit": 2, "run": 1, "jump": 0})):
        assert config.id2label == names
        assert config.label2id == {"jump": 0, "run": 1, "sit": 2}
        assert config.num_labels == 3
        assert not config.has_placeholder_labels
    assert VivitConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert VivitConfig(num_labels=3).has_placeholder_labels


def test_labels_come_in_the_order_of_their_numbers_whatever_the_order_of_a_file():
    """JSON sorts "10" before "2"."""
    config = VivitConfig(id2label={str(index): f"class {index}" for index in sorted(range(12), key=str)})

    assert list(config.id2label) == list(range(12))


def test_numbers_written_as_strings_are_read_in_label2id_too():
    assert VivitConfig(label2id={"a": "0", "b": "1"}).id2label == {0: "a", 1: "b"}


@pytest.mark.parametrize(
    "labels, told",
    [
        ({"id2label": {0: "a", 2: "b"}}, "id2label must be numbered 0 to 1 without a gap, got [0, 2]"),
        ({"id2label": {1: "a", 2: "b"}}, "id2label must be numbered 0 to 1"),
        ({"id2label": {}}, "id2label must be numbered"),
        ({"id2label": {"zero": "a"}}, "id2label must be numbered with whole numbers, got 'zero'"),
        ({"id2label": {0: "a", "0": "b"}}, "id2label must be numbered"),
        ({"id2label": {0: "a", 1: "a"}}, "id2label must be names of classes, each used once, got ['a']"),
        ({"id2label": {0: None}}, "id2label must be names of classes, each a string, got None"),
        ({"id2label": ["a", "b"]}, "id2label must be a mapping"),
        ({"id2label": {0: "a"}, "num_labels": 3}, "num_labels must be the number of classes named, 1, got 3"),
        (
            {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 2, "c": 1}},
            "label2id must be the inverse of id2label, where class 1 is 'b', got 'c'",
        ),
        (
            {"id2label": {0: "a"}, "label2id": {"a": 0, "b": 1}},
            "label2id must be the inverse of id2label, where class 1 is None, got 'b'",
        ),
        ({"label2id": {"a": 0, "b": 0}}, "label2id must be numbered 0 to 1"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "num_labels must be 2 or more"),
    ],
)
def test_labels_that_do_not_agree_are_refused(labels, told):
    with pytest.raises(ConfigError) as caught:
        VivitConfig(**labels)
    assert told in str(caught.value)


def test_a_config_keeps_labels_of_its_own():
    names = {0: "a", 1: "b"}
    config = VivitConfig(id2label=names)
    names[0] = "changed"

    assert config.id2label[0] == "a"


def test_with_labels_names_the_classes_and_keeps_their_number():
    config = VivitConfig(num_labels=3, num_frames=8)

    assert config.with_labels(["a", "b", "c"]) == VivitConfig(id2label={0: "a", 1: "b", 2: "c"}, num_frames=8)
    with pytest.raises(ConfigError, match="num_labels must be the number of classes named, 2, got 3"):
        config.with_labels(["a", "b"])


def test_a_hub_file_is_read_and_what_is_not_its_own_ignored():
    config = VivitConfig.from_dict(HUB_CONFIG)

    assert config == VivitConfig(num_labels=400)
    assert config.id2label[116] == "LABEL_116"


def test_another_model_type_is_an_error():
    with pytest.raises(ConfigError, match="model_type must be 'vivit', got 'videomae'"):
        VivitConfig.from_dict({**HUB_CONFIG, "model_type": "videomae"})


OWN = {
    "defaults": {},
    "labels": {"id2label": {0: "jump", 1: "run", 2: "sit"}, "problem_type": "multi_label_classification"},
    "everything": {
        "image_size": (32, 48),
        "num_frames": 6,
        "tubelet_size": (3, 8, 16),
        "num_channels": 1,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.2,
        "initializer_range": 0.5,
        "layer_norm_eps": 1e-3,
        "qkv_bias": False,
        "pooler_output_size": 7,
        "pooler_act": "gelu",
        "num_labels": 1,
        "problem_type": "regression",
    },
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_saved_and_loaded_again_it_is_equal(tmp_path, own):
    VivitConfig(**own).save_pretrained(tmp_path / "new" / "directory")

    assert VivitConfig.from_pretrained(tmp_path / "new" / "directory") == VivitConfig(**own)


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_transformers_reads_what_we_save_and_we_what_it_saves(tmp_path, own):
    ours = VivitConfig(**own)
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")

    assert isinstance(theirs, transformers.VivitConfig)
    for field in dataclasses.fields(ours):
        expected = getattr(ours, field.name)
        got = getattr(theirs, field.name)
        assert (tuple(got) if isinstance(got, list) else got) == expected, field.name
    assert VivitConfig.from_pretrained(tmp_path / "theirs") == ours


def test_the_file_names_its_model_and_architecture(tmp_path):
    VivitConfig().save_pretrained(tmp_path, architecture="VivitModel")
    saved = json.loads((tmp_path / "config.json").read_text())

    assert saved["model_type"] == "vivit"
    assert saved["architectures"] == ["VivitModel"]


def test_the_file_says_the_number_of_labels_once(tmp_path):
    """Whoever adds a class to id2label by hand need not know of another place."""
    VivitConfig(num_labels=3).save_pretrained(tmp_path)

    assert "num_labels" not in json.loads((tmp_path / "config.json").read_text())


def test_names_in_any_script_survive_the_file(tmp_path):
    config = VivitConfig(id2label={0: "überqueren", 1: "走る", 2: "🤸"})
    config.save_pretrained(tmp_path)

    assert VivitConfig.from_pretrained(tmp_path) == config


def test_a_broken_rule_in_a_file_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vivit", "hidden_size": 7}')
    with pytest.raises(CheckpointFileError, match="config.json: hidden_size must be a multiple"):
        VivitConfig.from_pretrained(tmp_path)


def test_a_directory_without_the_file_is_told(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="has no config.json"):
        VivitConfig.from_pretrained(tmp_path)
