"""VivitConfig: fields, validation, labels, and files exchanged with transformers."""

import dataclasses
import json

import pytest
import transformers

from handler import VivitConfig
from handler.checkpoints.hub import CheckpointFileError, CheckpointNotFoundError
from handler.models.config import ConfigError

# The file of google/vivit-b-16x2-kinetics400 since 2023, with the obsolete video_size and keys that are not ViViT's.
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


def test_fields_and_defaults_match_transformers():
    ours, theirs = VivitConfig(), transformers.VivitConfig()
    # The file omits defaults of the fields that transformers lacks.
    names = {field.name for field in dataclasses.fields(ours)} & {*ours.to_dict(), "num_labels"}

    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    common = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    assert {field.name for field in dataclasses.fields(theirs)} - common <= names


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VivitConfig().hidden_size = 12


def test_sizes_are_time_height_width():
    config = VivitConfig(image_size=[64, 96], num_frames=8, tubelet_size=[4, 16, 32])

    assert (config.image_height, config.image_width) == (64, 96)
    assert config.grid == (2, 4, 3)
    assert config.num_patches == 24
    assert (VivitConfig().image_height, VivitConfig().grid) == (224, (16, 14, 14))


def test_pooler_width_defaults_to_hidden_size():
    assert VivitConfig(hidden_size=24).pooler_output_size == 24
    assert VivitConfig(pooler_output_size=10).pooler_output_size == 10


@pytest.mark.parametrize(
    "name, value, rule",
    [
        ("image_size", 0, "an integer >= 1"),
        ("image_size", "224", "an integer"),
        ("image_size", (224,), "2 integers (height, width), each >= 1"),
        ("image_size", (224, 224.0), "2 integers (height, width)"),
        ("image_size", 225, "a multiple of the 16x16 pixels of a tubelet"),
        ("image_size", (224, 225), "a multiple of the 16x16 pixels"),
        ("num_frames", 31, "a multiple of the 2 frames of a tubelet"),
        ("num_frames", 32.0, "an integer"),
        ("num_frames", True, "an integer"),
        ("tubelet_size", (2, 16), "3 integers (frames, height, width)"),
        ("tubelet_size", (2, 16, -16), "each >= 1"),
        ("tubelet_size", 16, "(frames, height, width)"),
        ("num_channels", -3, "an integer >= 1"),
        ("hidden_size", None, "an integer"),
        ("hidden_size", 770, "a multiple of num_attention_heads (12)"),
        ("num_hidden_layers", 0, "an integer >= 1"),
        ("num_attention_heads", 0, "an integer >= 1"),
        ("intermediate_size", -1, "an integer >= 1"),
        ("pooler_output_size", 0, "an integer >= 1"),
        ("hidden_act", "gelu_fsat", "gelu_fast"),
        ("hidden_act", None, "gelu_fast"),
        ("pooler_act", ["tanh"], "tanh"),
        ("hidden_dropout_prob", 1.5, "a number >= 0 and <= 1"),
        ("hidden_dropout_prob", "0.1", "a number"),
        ("attention_probs_dropout_prob", -0.1, "a number >= 0"),
        ("attention_probs_dropout_prob", float("nan"), "a number >= 0"),
        ("initializer_range", -0.02, "a number >= 0"),
        ("initializer_range", float("inf"), "a number >= 0"),
        ("layer_norm_eps", 0, "a number > 0"),
        ("qkv_bias", 1, "true or false"),
        ("problem_type", "classification", "single_label_classification"),
        ("num_labels", 0, "an integer >= 1"),
        ("num_labels", "2", "an integer"),
    ],
)
def test_invalid_value(name, value, rule):
    with pytest.raises(ConfigError) as caught:
        VivitConfig(**{name: value})
    for part in (f"{name} must be ", rule, f"got {value!r}"):
        assert part in str(caught.value)


SELF_ATTENTION, DOT_PRODUCT = "factorised_self_attention", "factorised_dot_product"


@pytest.mark.parametrize(
    "given, resolved",
    [
        ({}, ("spatiotemporal", None, None, "cls")),
        ({"classifier_pooling": "mean"}, ("spatiotemporal", None, None, "mean")),
        ({"attention_type": "factorised_encoder"}, ("factorised_encoder", 4, None, "cls")),
        (
            {"attention_type": "factorised_encoder", "num_temporal_layers": 24, "classifier_pooling": "mean"},
            ("factorised_encoder", 24, None, "mean"),
        ),
        ({"attention_type": SELF_ATTENTION}, (SELF_ATTENTION, None, "time_space", "mean")),
        (
            {"attention_type": SELF_ATTENTION, "attention_order": "space_time", "classifier_pooling": "mean"},
            (SELF_ATTENTION, None, "space_time", "mean"),
        ),
        ({"attention_type": DOT_PRODUCT}, (DOT_PRODUCT, None, None, "mean")),
    ],
)
def test_architecture_defaults_depend_on_attention_type(given, resolved):
    config = VivitConfig(**given)
    fields = (config.attention_type, config.num_temporal_layers, config.attention_order, config.classifier_pooling)
    assert fields == resolved
    assert VivitConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"attention_type": "joint"},
            "attention_type must be one of spatiotemporal, factorised_encoder, factorised_self_attention, "
            "factorised_dot_product, got 'joint'",
        ),
        ({"attention_type": None}, "attention_type must be one of"),
        ({"num_temporal_layers": 4}, "num_temporal_layers must be None unless attention_type is 'factorised_encoder'"),
        ({"attention_type": "factorised_encoder", "num_temporal_layers": 0}, "num_temporal_layers must be an integer"),
        ({"attention_order": "time_space"}, "attention_order must be None unless attention_type is 'factorised_self_"),
        ({"attention_type": SELF_ATTENTION, "attention_order": "time"}, "attention_order must be one of time_space, "),
        ({"classifier_pooling": "max"}, "classifier_pooling must be one of cls, mean, got 'max'"),
        (
            {"attention_type": SELF_ATTENTION, "classifier_pooling": "cls"},
            "classifier_pooling must be 'mean' for the attention_type 'factorised_self_attention', which has no CLS",
        ),
        ({"attention_type": DOT_PRODUCT, "classifier_pooling": "cls"}, "classifier_pooling must be 'mean' for"),
        ({"attention_type": DOT_PRODUCT, "num_attention_heads": 3}, "num_attention_heads must be even for the"),
        ({"tubelet_embedding": "frames"}, "tubelet_embedding must be one of tubelet, uniform_frames, got 'frames'"),
        ({"drop_path_rate": 1.1}, "drop_path_rate must be a number >= 0 and <= 1, got 1.1"),
    ],
)
def test_invalid_architecture(given, message):
    with pytest.raises(ConfigError) as caught:
        VivitConfig(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "given, tokens, longest",
    [
        ({}, 3137, 3137),
        ({"classifier_pooling": "mean"}, 3136, 3136),
        ({"attention_type": "factorised_encoder"}, 16 * 197, 197),
        ({"attention_type": "factorised_encoder", "image_size": 32, "classifier_pooling": "mean"}, 64, 16),
        ({"attention_type": SELF_ATTENTION}, 3136, 196),
        ({"attention_type": DOT_PRODUCT, "image_size": 32}, 64, 16),
    ],
)
def test_number_of_tokens(given, tokens, longest):
    assert (VivitConfig(**given).num_tokens, VivitConfig(**given).sequence_length) == (tokens, longest)


def test_unknown_field():
    with pytest.raises(TypeError, match="hiden_size"):
        VivitConfig(hiden_size=768)


def test_labels_derived_from_any_one_field():
    names = {0: "jump", 1: "run", 2: "sit"}
    for config in (VivitConfig(id2label=names), VivitConfig(label2id={"sit": "2", "run": 1, "jump": 0})):
        assert config.id2label == names
        assert config.label2id == {"jump": 0, "run": 1, "sit": 2}
        assert config.num_labels == 3
        assert not config.has_placeholder_labels
    names[0] = "changed"  # must not change the configuration
    assert config.id2label[0] == "jump"
    assert VivitConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert VivitConfig(num_labels=3).has_placeholder_labels


def test_labels_ordered_by_index():
    # JSON with sorted keys has "10" before "2".
    config = VivitConfig(id2label={str(index): f"class {index}" for index in sorted(range(12), key=str)})

    assert list(config.id2label) == list(range(12))


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"id2label": {0: "a", 2: "b"}}, "id2label must be numbered 0 to 1 without gaps, got [0, 2]"),
        ({"id2label": {1: "a", 2: "b"}}, "id2label must be numbered 0 to 1"),
        ({"id2label": {}}, "id2label must be numbered"),
        ({"id2label": {"zero": "a"}}, "id2label must be numbered with integers, got 'zero'"),
        ({"id2label": {0: "a", "0": "b"}}, "id2label must be numbered"),
        ({"id2label": {0: "a", 1: "a"}}, "id2label must be a mapping of unique class labels, got ['a']"),
        ({"id2label": {0: None}}, "id2label must be a mapping of class labels, all of them strings, got None"),
        ({"id2label": ["a", "b"]}, "id2label must be a mapping"),
        ({"label2id": ["a", "b"]}, "label2id must be a mapping"),
        ({"id2label": {0: "a"}, "num_labels": 3}, "num_labels must be the number of labels (1), got 3"),
        ({"label2id": {"a": 0, "b": 0}}, "label2id must be numbered 0 to 1"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "num_labels must be >= 2"),
    ],
)
def test_invalid_labels(labels, message):
    with pytest.raises(ConfigError) as caught:
        VivitConfig(**labels)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "label2id, message",
    [
        ({"LABEL_0": 0, "LABEL_1": 1}, "the class 'jump' has the index None in label2id and 0 in id2label"),
        ({"jump": 1, "run": 0}, "the class 'jump' has the index 1 in label2id and 0 in id2label"),
        ({"jump": 0, "run": 1, "sit": 2}, "the class 'sit' has the index 2 in label2id and None in id2label"),
        ({"jump": 0, "run": "first"}, "the class 'run' has the index first in label2id"),
    ],
)
def test_stale_label2id_ignored_with_warning(label2id, message):
    with pytest.warns(UserWarning, match=message) as caught:
        config = VivitConfig(id2label={0: "jump", 1: "run"}, label2id=label2id)
    assert config == VivitConfig(id2label={0: "jump", 1: "run"})
    assert config.label2id == {"jump": 0, "run": 1}
    assert caught[0].filename == __file__


def test_consistent_labels_do_not_warn(recwarn):
    VivitConfig(id2label={"0": "a", "1": "b"}, label2id={"b": "1", "a": 0}, num_labels=2)
    assert not recwarn.list


def test_with_labels_keeps_number_of_classes():
    config = VivitConfig(num_labels=3, num_frames=8)

    assert config.with_labels(["a", "b", "c"]) == VivitConfig(id2label={0: "a", 1: "b", 2: "c"}, num_frames=8)
    with pytest.raises(ConfigError, match=r"num_labels must be the number of labels \(2\), got 3"):
        config.with_labels(["a", "b"])
    with pytest.raises(ConfigError, match=r"unique class labels, got \['a'\]"):
        config.with_labels(["a", "b", "a"])


def test_hub_file_read_without_unknown_keys():
    config = VivitConfig.from_dict(HUB_CONFIG)

    assert config == VivitConfig(num_labels=400)
    assert config.id2label[116] == "LABEL_116"


def test_other_model_type():
    with pytest.raises(ConfigError, match="model_type must be 'vivit', got 'videomae'"):
        VivitConfig.from_dict({**HUB_CONFIG, "model_type": "videomae"})


CONFIGS = {
    "defaults": VivitConfig(),
    "labels": VivitConfig(id2label={0: "überqueren", 1: "走る", 2: "🤸"}, problem_type="multi_label_classification"),
    "all fields": VivitConfig(
        image_size=(32, 48),
        num_frames=6,
        tubelet_size=(3, 8, 16),
        num_channels=1,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        hidden_act="relu",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.2,
        initializer_range=0.5,
        layer_norm_eps=1e-3,
        qkv_bias=False,
        pooler_output_size=7,
        pooler_act="gelu",
        num_labels=1,
        problem_type="regression",
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_files_are_exchangeable_with_transformers(tmp_path, config):
    config.save_pretrained(tmp_path / "new" / "ours")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "new" / "ours")
    theirs.save_pretrained(tmp_path / "theirs")

    assert isinstance(theirs, transformers.VivitConfig)
    for name, expected in config.to_dict().items():
        value = getattr(theirs, name)
        assert (tuple(value) if isinstance(value, list) else value) == expected, name
    assert VivitConfig.from_pretrained(tmp_path / "new" / "ours") == config
    assert VivitConfig.from_pretrained(tmp_path / "theirs") == config


ACTIONS = {"verb": ["cut", "put-down"], "noun": ["onion", "cut", "pan"]}  # "cut" is a verb and a noun
ACTION_LABELS = dict(enumerate(label for labels in ACTIONS.values() for label in labels))


def test_labels_of_several_heads():
    config = VivitConfig(label_heads={"verb": 2, "noun": 3}, id2label=ACTION_LABELS)
    assert (config.num_labels, config.labels_of_heads, config.label2id) == (5, ACTIONS, {})
    assert dataclasses.replace(config, num_frames=8).labels_of_heads == ACTIONS
    other = config.with_labels(["a", "b", "c", "a", "d"])
    assert other.labels_of_heads == {"verb": ["a", "b"], "noun": ["c", "a", "d"]}
    assert other.with_labels("abcde").label2id == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}

    unnamed = VivitConfig(label_heads=[["noun", 300], ["verb", 97]])
    assert unnamed.num_labels == 397 and unnamed.has_placeholder_labels
    assert unnamed.labels_of_heads["verb"][0] == "LABEL_300"
    assert VivitConfig().labels_of_heads == {}


@pytest.mark.filterwarnings("error")
def test_order_of_heads_survives_files(tmp_path):
    config = VivitConfig(label_heads={"verb": 2, "noun": 3}, id2label=ACTION_LABELS)
    config.save_pretrained(tmp_path / "ours")
    transformers.AutoConfig.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        loaded = VivitConfig.from_pretrained(tmp_path / folder)
        assert loaded == config and loaded.labels_of_heads == ACTIONS
    assert "label_heads" not in VivitConfig().to_dict()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label_heads": {}}, "label_heads must be the names and numbers of labels of two or more heads, got {}"),
        ({"label_heads": {"verb": 5}}, "of two or more heads, got {'verb': 5}"),
        ({"label_heads": "verb=2,noun=3"}, "of two or more heads, got 'verb=2,noun=3'"),
        ({"label_heads": ["ab", "cd"]}, "of two or more heads"),
        ({"label_heads": {"verb": 2, "": 3}}, "label_heads must be named with strings that are not empty, got ''"),
        ({"label_heads": {"verb": 2, 1: 3}}, "not empty, got 1"),
        ({"label_heads": {"verb": 5, "noun": 0}}, "label_heads['noun'] must be an integer >= 1, got 0"),
        ({"label_heads": [("verb", 2), ("verb", 3)]}, "label_heads must be heads with different names"),
        ({"label_heads": {"verb": 2, "noun": 2}}, "label_heads must be sizes with the sum of num_labels (5), got {"),
        ({"problem_type": "regression"}, "problem_type must be single_label_classification with label_heads"),
        ({"id2label": dict(enumerate("abcdc"))}, "unique class labels within the head 'noun', got ['c']"),
    ],
)
def test_invalid_heads(changes, message):
    with pytest.raises(ConfigError) as caught:
        VivitConfig(**{"label_heads": {"verb": 2, "noun": 3}, "id2label": ACTION_LABELS, **changes})
    assert message in str(caught.value)


def test_file_content(tmp_path):
    VivitConfig(num_labels=3).save_pretrained(tmp_path, architecture="VivitModel")
    saved = json.loads((tmp_path / "config.json").read_text())

    assert saved["model_type"] == "vivit"
    assert saved["architectures"] == ["VivitModel"]
    assert "num_labels" not in saved  # only id2label needs to be changed when editing the file
    # What transformers does not know is not in the file of the model that it has.
    assert not saved.keys() - transformers.VivitConfig().to_dict().keys()
    VivitConfig(attention_type=SELF_ATTENTION, drop_path_rate=0.1).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in saved.keys() - transformers.VivitConfig().to_dict().keys()} == {
        "attention_type": SELF_ATTENTION,
        "attention_order": "time_space",
        "classifier_pooling": "mean",
        "drop_path_rate": 0.1,
    }


def test_invalid_file_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="has no config.json"):
        VivitConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vivit", "hidden_size": 7}')
    with pytest.raises(CheckpointFileError, match="config.json: hidden_size must be a multiple"):
        VivitConfig.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="revison"):
        VivitConfig.from_pretrained(tmp_path, revison="main")
