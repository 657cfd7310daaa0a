"""Initial weights: ViViTs of other variants and sizes, and image ViTs with transformers as the oracle.

B  clips      T', H', W'  tubelets along time, height and width      D  hidden size
"""

import itertools
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from handler import VivitConfig, VivitForVideoClassification, VivitImageProcessor
from handler.checkpoints.hub import CheckpointError
from handler.checkpoints.names import to_published
from handler.training.initialization import initialize_model, initialize_processor
from handler.validation import ConfigError
from tests.support.oracle import TINY

LABELS = ["left", "right", "still"]
VARIANTS = {
    "spatiotemporal": {},
    "spatiotemporal mean": {"classifier_pooling": "mean"},
    "factorised encoder": {"attention_type": "factorised_encoder", "num_temporal_layers": 3},
    "factorised self-attention": {"attention_type": "factorised_self_attention"},
    "factorised dot-product": {"attention_type": "factorised_dot_product"},
}
SIZES = {**TINY, "num_attention_heads": 2}
IMAGE_SIZES = {name: value for name, value in SIZES.items() if name != "num_frames"}

TIMM_NAMES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("encoder.layer.", "blocks."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention.output.dense", "attn.proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("layernorm.", "norm."),
)


def randomize(model):
    """Gives all parameters random values, also those that are initialized with 0 or 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


@pytest.fixture(scope="module")
def image_vit(tmp_path_factory):
    """A random image ViT of transformers, and its checkpoint."""
    config = transformers.ViTConfig(**IMAGE_SIZES, layer_norm_eps=1e-6)  # timm's; the default is 1e-12
    model = randomize(transformers.ViTModel(config))
    directory = tmp_path_factory.mktemp("vit")
    model.save_pretrained(directory)
    return model, directory


@pytest.fixture(scope="module")
def timm_vit(tmp_path_factory, image_vit):
    """The same model with timm's names, as one file with a config.json of timm."""
    state = {}
    for name, tensor in load_file(image_vit[1] / "model.safetensors").items():
        for theirs, timms in TIMM_NAMES:
            name = name.replace(theirs, timms)
        state[name] = tensor
    for layer, suffix in itertools.product(range(SIZES["num_hidden_layers"]), ("weight", "bias")):
        parts = [state.pop(f"blocks.{layer}.attention.attention.{part}.{suffix}") for part in ("query", "key", "value")]
        state[f"blocks.{layer}.attn.qkv.{suffix}"] = torch.cat(parts)
    state = {name: tensor for name, tensor in state.items() if "pooler" not in name}
    state |= {"head.weight": torch.zeros(1000, 24), "head.bias": torch.zeros(1000)}
    directory = tmp_path_factory.mktemp("timm")
    save_file(state, directory / "model.safetensors")
    settings = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "input_size": [3, 32, 32]}
    (directory / "config.json").write_text(json.dumps({"architecture": "vit_x", "pretrained_cfg": settings}))
    return directory


def save_vivit(directory, **config):
    """Saves a random ViViT with LABELS."""
    model = randomize(VivitForVideoClassification(VivitConfig(**{**SIZES, **config}, id2label=dict(enumerate(LABELS)))))
    model.save_pretrained(directory)
    return model


def published(model) -> dict[str, torch.Tensor]:
    return dict(to_published(model.state_dict()))


def still_clips(config, count: int = 2) -> torch.Tensor:
    """Clips (B, T, C, H, W) of identical random frames."""
    image = torch.randn(count, 1, 3, config.image_height, config.image_width)
    return image.expand(-1, config.num_frames, -1, -1, -1).contiguous()


@torch.no_grad()
def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# Image ViTs


@pytest.mark.parametrize("tubelet_init", ["central_frame", "filter_inflation"])
@torch.no_grad()
def test_still_clips_are_embedded_like_the_image(image_vit, tubelet_init):
    theirs, directory = image_vit
    model = initialize_model(directory, labels=LABELS, changes={"num_frames": 8}, tubelet_init=tubelet_init)
    clips = still_clips(model.config)
    tokens = model.vivit.embedding(clips)  # (B, 1 + T' * H' * W', D)
    expected = theirs.embeddings(clips[:, 0])  # (B, 1 + H' * W', D)
    assert difference(tokens[:, :1], expected[:, :1]) < 1e-5
    for step in tokens[:, 1:].unflatten(1, (4, -1)).unbind(1):
        assert difference(step, expected[:, 1:]) < 1e-5
    clips[:, ::2] = 0  # the first of the two frames of each tubelet
    assert (difference(model.vivit.embedding(clips), tokens) < 1e-5) == (tubelet_init == "central_frame")


@pytest.mark.parametrize(("naming", "height"), [("transformers", 32), ("timm", 32), ("transformers", 48)])
@torch.no_grad()
def test_spatial_encoder_computes_the_features_of_the_image_vit(image_vit, timm_vit, naming, height):
    theirs, directory = image_vit
    changes = {"attention_type": "factorised_encoder", "num_frames": 6, "image_size": (height, 32)}
    if naming == "timm":
        directory, changes = timm_vit / "model.safetensors", {**changes, "num_attention_heads": 2}
    model = initialize_model(directory, labels=LABELS, changes=changes)
    assert model.config.hidden_act == "gelu"
    assert model.config.layer_norm_eps == 1e-6
    clips = torch.randn(3, 6, 3, height, 32)
    states = model.vivit(clips, output_hidden_states=True).hidden_states
    spatial = states[SIZES["num_hidden_layers"]]  # (B, T', 1 + H' * W', D)
    features = model.vivit.layernorm(spatial)[:, :, 0]  # (B, T', D)
    for step in range(3):
        central = clips[:, 2 * step + 1]  # the second of the two frames of a tubelet
        expected = theirs(central, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        assert difference(features[:, step], expected) < 1e-5


def test_timm_and_transformers_names_give_the_same_model(image_vit, timm_vit):
    models = [
        initialize_model(path, labels=LABELS, changes={"num_attention_heads": 2, "image_size": 48})
        for path in (image_vit[1], timm_vit)
    ]
    ours, theirs = map(published, models)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("order", ["time_space", "space_time"])
@torch.no_grad()
def test_factorised_self_attention_computes_time_steps_separately_at_first(image_vit, order):
    changes = {"attention_type": "factorised_self_attention", "attention_order": order, "num_frames": 4}
    model = initialize_model(image_vit[1], labels=LABELS, changes=changes)
    image_changes = {"classifier_pooling": "mean", "num_frames": 2}
    image_model = initialize_model(image_vit[1], labels=LABELS, changes=image_changes)
    clips = torch.randn(2, 4, 3, 32, 32)
    found = model.vivit(clips).last_hidden_state.unflatten(1, (2, -1))  # (B, T', H' * W', D)
    for step in range(2):
        expected = image_model.vivit(clips[:, 2 * step : 2 * step + 2]).last_hidden_state  # (B, H' * W', D)
        assert difference(found[:, step], expected) < 1e-5


def test_temporal_attention_can_be_trained(image_vit):
    changes = {"attention_type": "factorised_self_attention", "num_frames": 4}
    model = initialize_model(image_vit[1], labels=LABELS, changes=changes)
    torch.nn.init.normal_(model.classifier.weight)
    before = {name: tensor.clone() for name, tensor in published(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 4, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    for name, tensor in published(model).items():
        if "attention_time" in name and "key.bias" not in name:  # which has no effect
            assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blocks.0.ls1.gamma", (24,), "LayerScale"),
        ("reg_token", (1, 4, 24), "register tokens"),
        ("dist_token", (1, 1, 24), "distillation token"),
        ("blocks.0.attn.q_norm.weight", (12,), "queries and keys"),
        ("blocks.1.mlp.fc1_g.weight", (40, 24), "SwiGLU"),
        ("blocks.0.mlp.fc1.weight", (80, 24), "SwiGLU"),
        ("norm_pre.weight", (24,), "before the encoder"),
        ("fc_norm.weight", (24,), "mean pooling"),
        ("pos_embed", (1, 4, 24), "CLS and a grid"),
        ("cls_token", None, "CLS token"),
        ("norm.bias", None, "missing: vivit.layernorm.bias"),
        ("blocks.1.norm2.weight", None, r"missing: vivit.encoder.layer.1.layernorm_after.weight"),
        ("blocks.0.attn.qkv.bias", None, r"attention.query.bias"),
        ("adapter.weight", (3, 3), "unexpected: adapter.weight"),
        ("blocks.1.mlp.fc2.weight", (24, 41), "wrong shape"),
    ],
)
def test_unsupported_image_vits_rejected_by_name(timm_vit, tmp_path, name, shape, message):
    state = load_file(timm_vit / "model.safetensors")
    state.pop(name, None)
    if shape:
        state[name] = torch.zeros(shape)
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(CheckpointError, match=message):
        initialize_model(tmp_path / "vit.safetensors", labels=LABELS, changes={"num_attention_heads": 2})


def test_number_of_heads_is_not_guessed_for_unusual_sizes(timm_vit):
    with pytest.raises(CheckpointError, match="set num_attention_heads"):
        initialize_model(timm_vit, labels=LABELS, changes={})


# ViViTs


@pytest.mark.parametrize("target", VARIANTS)
@pytest.mark.parametrize("start", VARIANTS)
def test_every_variant_starts_from_every_other(tmp_path, start, target):
    source = save_vivit(tmp_path, **VARIANTS[start])
    changes = {"attention_type": "spatiotemporal", **VARIANTS[target], "num_frames": 8, "image_size": (48, 32)}
    model = initialize_model(tmp_path, labels=["a", "b"], changes=changes)
    assert not model.training
    model.save_pretrained(tmp_path / "saved")  # what is saved can be loaded
    assert VivitForVideoClassification.from_pretrained(tmp_path / "saved").config == model.config
    before, after = published(source), published(model)
    assert not after["classifier.weight"].any()
    copied = [name for name in after if name in before and torch.equal(after[name], before[name])]
    shared = [name for name in after if name in before and "position" not in name and "classifier" not in name]
    assert set(shared) <= set(copied)
    assert "vivit.encoder.layer.1.output.dense.weight" in copied
    logits = model(torch.randn(1, 8, 3, 48, 32)).logits
    assert not logits.any()


def test_spatial_positions_are_the_mean_over_time(tmp_path):
    before = published(save_vivit(tmp_path))["vivit.embeddings.position_embeddings"]
    model = initialize_model(tmp_path, labels=LABELS, changes={"attention_type": "factorised_encoder"})
    after = published(model)["vivit.embeddings.position_embeddings"]
    assert torch.equal(after[:, 0], before[:, 0])
    assert difference(after[0, 1:], (before[0, 1:5] + before[0, 5:]) / 2) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_same_model_without_changes(tmp_path, variant):
    source = save_vivit(tmp_path, **VARIANTS[variant])
    model = initialize_model(tmp_path, labels=LABELS, changes={})
    assert model.config == source.config
    clips = torch.randn(2, 4, 3, 32, 32)
    assert torch.equal(model(clips).logits, source(clips).logits)


@torch.no_grad()
def test_factorised_encoder_keeps_both_encoders_at_other_sizes(tmp_path):
    source = save_vivit(tmp_path, **VARIANTS["factorised encoder"])
    model = initialize_model(tmp_path, labels=LABELS, changes={"num_frames": 12, "image_size": 64})
    clips = torch.randn(2, 12, 3, 64, 64)
    expected = source(clips, interpolate_pos_encoding=True).logits
    assert difference(model(clips).logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, r"hidden_size must be that of the initial weights \(24\)"),
        ({"num_hidden_layers": 3}, "num_hidden_layers"),
        ({"num_attention_heads": 4}, "num_attention_heads"),
        ({"tubelet_size": (2, 8, 8)}, "16x16 pixels"),
        ({"tubelet_size": (4, 16, 16)}, "of 2 frames"),
        ({"frames": 8}, "did you mean 'num_frames'"),
        ({"num_labels": 7}, "unknown field 'num_labels'"),
    ],
)
def test_impossible_changes_rejected(tmp_path, changes, message):
    save_vivit(tmp_path)
    with pytest.raises(ConfigError, match=message):
        initialize_model(tmp_path, labels=LABELS, changes=changes)


# Image processors


def test_processor_of_image_vit_has_its_normalization(timm_vit, image_vit):
    config = VivitConfig(image_size=112)
    processor = initialize_processor(timm_vit / "model.safetensors", config=config)
    scale, bias = processor.scale_and_bias()
    white = 255 * torch.from_numpy(scale) + torch.from_numpy(bias)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert difference(white, expected) < 1e-5
    assert processor.resize_crop.crop_to == (112, 112)
    assert processor.resize_crop.resize_to == 128
    scale, bias = initialize_processor(image_vit[1], config=config).scale_and_bias()  # it has no file for it
    assert (255 * scale + bias).tolist() == pytest.approx([1] * 3)
    assert bias.tolist() == [-1] * 3


def test_processor_of_image_vit_reads_its_file(image_vit, tmp_path):
    values = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    (tmp_path / "config.json").write_text((image_vit[1] / "config.json").read_text())
    scale, bias = initialize_processor(tmp_path, config=VivitConfig()).scale_and_bias()
    assert (255 * scale + bias).tolist() == pytest.approx([1.8, 1.6, 2.8], abs=1e-5)


def test_processor_of_vivit_keeps_its_proportions(tmp_path):
    save_vivit(tmp_path)
    processor = VivitImageProcessor(size={"shortest_edge": 40}, crop_size=32, do_normalize=False)
    processor.save_pretrained(tmp_path)
    config = VivitConfig(**SIZES)
    assert initialize_processor(tmp_path, config=config) == processor
    larger = initialize_processor(tmp_path, config=VivitConfig(**{**SIZES, "image_size": 64}))
    assert larger.resize_crop.resize_to == 80
    assert larger.resize_crop.crop_to == (64, 64)
    assert not larger.do_normalize
