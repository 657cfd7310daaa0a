"""The model against transformers, outputs, gradients and losses; then what is our own.

B  clips    T  frames    D  hidden size    N  tokens, CLS included    h  attention heads
"""

import math

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers.activations import ACT2FN

from handler import VivitConfig, VivitForVideoClassification, VivitModel
from handler.checkpoints.names import from_published, to_published
from handler.kernels import cpu
from handler.models import vivit as model

IMPLEMENTATIONS = ("sdpa", "eager")

TINY = {
    "image_size": 32,
    "num_frames": 4,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_labels": 5,
}
VARIANTS = {
    "tiny": {},
    "non-square": {"image_size": (32, 48)},
    "no bias on query, key and value": {"qkv_bias": False},
    "one head, one channel": {"num_attention_heads": 1, "num_channels": 1},
    "other tubelets": {"num_frames": 6, "tubelet_size": (3, 8, 16)},
    "other functions": {"hidden_act": "relu", "layer_norm_eps": 1e-2},
    "other pooler": {"pooler_act": "gelu", "pooler_output_size": 7},
}
# As wide and as deep as ViViT-B/16x2, on a clip of one tubelet in time, for the sake of seconds.
BASE = {"num_frames": 2, "num_labels": 400}


def published(model_class, own: dict):
    """transformers' model, every parameter random: also those that start as zeros or ones."""
    torch.manual_seed(0)
    theirs = model_class(transformers.VivitConfig(**own))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.normal_(std=scale)
            if "layernorm" in name and name.endswith("weight"):
                parameter.add_(1)
    theirs.set_attn_implementation("eager")
    return theirs.eval()


def copy_of(theirs, attn_implementation: str = "sdpa"):
    """Our model with the weights of theirs."""
    encoder = isinstance(theirs, transformers.VivitModel)
    model_class = VivitModel if encoder else VivitForVideoClassification
    own = VivitConfig.from_dict(theirs.config.to_dict())
    ours = model_class(own, attn_implementation=attn_implementation)
    ours.load_state_dict(from_published(theirs.state_dict()))
    return ours.eval()


def clips(own, count: int = 2) -> torch.Tensor:
    """(count, T, C, H, W) for a configuration of theirs or of ours."""
    size = own.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, own.num_frames, own.num_channels, height, width, generator=generator)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 10 * tolerance, "too small to tell anything"
    assert (ours - theirs).abs().max() < tolerance


# Against transformers


@pytest.mark.parametrize("name", sorted(model.ACTIVATIONS))
def test_an_activation_is_the_function_that_transformers_has_by_that_name(name):
    x = torch.linspace(-12, 12, 4001)
    assert_close(model.ACTIVATIONS[name](x), ACT2FN[name](x), 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_logits_agree(variant, implementation):
    theirs = published(transformers.VivitForVideoClassification, {**TINY, **variant})
    ours = copy_of(theirs, implementation)
    x = clips(theirs.config)

    assert_close(ours(x).logits, theirs(x).logits)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_logits_agree_where_no_gradient_is_asked_for_and_products_are_others(variant, onednn, monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN_IS_FASTER", onednn)
    monkeypatch.setattr(cpu, "MIN_TOKENS", 1)
    monkeypatch.setattr(cpu, "ROWS", 2)
    theirs = published(transformers.VivitForVideoClassification, {**TINY, **variant})
    ours = copy_of(theirs)
    x = clips(theirs.config)

    with torch.inference_mode():
        assert_close(ours(x).logits, theirs(x).logits)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_encoder_agrees_in_all_that_it_returns(variant):
    theirs = published(transformers.VivitModel, {**TINY, **variant})
    ours = copy_of(theirs, "eager")
    x = clips(theirs.config)
    got = ours(x, output_hidden_states=True, output_attentions=True)
    expected = theirs(x, output_hidden_states=True, output_attentions=True)

    assert list(got) == list(expected)
    assert_close(got.last_hidden_state, expected.last_hidden_state)
    assert_close(got.pooler_output, expected.pooler_output)
    assert len(got.hidden_states) == len(expected.hidden_states) == theirs.config.num_hidden_layers + 1
    assert len(got.attentions) == len(expected.attentions) == theirs.config.num_hidden_layers
    for name in ("hidden_states", "attentions"):
        for layer, expected_of_layer in zip(got[name], expected[name]):
            assert_close(layer, expected_of_layer)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_cls_token_alone_is_what_it_is_among_all_tokens(variant, implementation):
    ours = copy_of(published(transformers.VivitModel, {**TINY, **variant}), implementation)
    x = clips(ours.config)
    alone, among_all = ours(x, cls_only=True), ours(x)

    assert_close(alone.last_hidden_state, among_all.last_hidden_state[:, :1], 1e-5)
    assert_close(alone.pooler_output, among_all.pooler_output, 1e-5)


def test_a_classifier_computes_no_more_of_its_last_layer_than_it_reads():
    ours = VivitForVideoClassification(VivitConfig(**TINY)).eval()
    rows = []
    ours.vivit.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    ours(clips(ours.config))
    ours(clips(ours.config), output_hidden_states=True)

    assert rows == [1, 1 + ours.config.num_patches]


def test_hidden_states_cost_no_attentions_and_sdpa_returns_them_too():
    ours = VivitModel(VivitConfig(**TINY)).eval()
    outputs = ours(clips(ours.config), output_hidden_states=True)

    assert outputs.attentions is None
    assert torch.equal(ours.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("own", [TINY, {**TINY, "qkv_bias": False, "image_size": (32, 48)}])
def test_gradients_of_every_parameter_agree(own, implementation):
    assert_gradients_agree(published(transformers.VivitForVideoClassification, own), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_and_gradients_agree_for_a_model_of_base_size(implementation):
    theirs = published(transformers.VivitForVideoClassification, BASE)
    assert_gradients_agree(theirs, implementation)


def assert_gradients_agree(theirs, implementation):
    ours = copy_of(theirs, implementation).train()
    x = clips(theirs.config)
    labels = torch.tensor([3, 1])
    expected, got = theirs.train()(x, labels=labels), ours(x, labels=labels)
    expected.loss.backward()
    got.loss.backward()

    assert_close(got.logits, expected.logits)
    assert_close(got.loss, expected.loss)
    gradients = to_published({name: weight.grad for name, weight in ours.named_parameters()})
    translated = to_published(
        from_published({name: weight.grad for name, weight in theirs.named_parameters()})
    )
    assert gradients.keys() == translated.keys()
    for name, gradient in gradients.items():
        assert (gradient - translated[name]).abs().max() < 1e-4, name
    assert sum(gradient.abs().max() > 1e-2 for gradient in gradients.values()) > len(gradients) / 2


LOSSES = {
    "single-label": ({"problem_type": "single_label_classification"}, torch.tensor([3, 1])),
    "single-label, one to ignore": ({"problem_type": "single_label_classification"}, torch.tensor([3, -100])),
    "multi-label": ({"problem_type": "multi_label_classification"}, torch.eye(5)[:2]),
    "regression of five": ({"problem_type": "regression"}, torch.linspace(0, 1, 10).view(2, 5)),
    "regression of one": ({"problem_type": "regression", "num_labels": 1}, torch.tensor([0.5, -1.0])),
    "regression of one, as a column": ({"problem_type": "regression", "num_labels": 1}, torch.tensor([[0.5], [-1.0]])),
    "told by whole numbers": ({}, torch.tensor([3, 1])),
    "told by fractions": ({}, torch.full((2, 5), 0.25)),
    "told by the single output": ({"num_labels": 1}, torch.tensor([0.5, -1.0])),
}


@pytest.mark.parametrize("own, labels", LOSSES.values(), ids=LOSSES)
def test_losses_agree(own, labels):
    theirs = published(transformers.VivitForVideoClassification, {**TINY, **own})
    ours = copy_of(theirs)
    x = clips(theirs.config)
    asked_for = ours.config.problem_type

    assert_close(ours(x, labels=labels).loss, theirs(x, labels=labels).loss)
    assert ours.config.problem_type == asked_for  # told from the labels anew each time


def test_truth_values_and_short_integers_serve_as_labels():
    logits = torch.randn(2, 5)
    expected = model.classification_loss(logits, torch.eye(5)[:2])

    assert torch.equal(model.classification_loss(logits, torch.eye(5)[:2].bool()), expected)
    assert torch.equal(
        model.classification_loss(logits, torch.tensor([3, 1], dtype=torch.int32)),
        model.classification_loss(logits, torch.tensor([3, 1])),
    )


@pytest.mark.parametrize(
    "labels, problem_type, expected",
    [
        (torch.tensor([1, 2, 3]), None, r"shape \(2,\) for single_label_classification, got \(3,\)"),
        (torch.ones(2, 4), None, r"shape \(2, 5\) for multi_label_classification, got \(2, 4\)"),
        (torch.ones(2), "regression", r"shape \(2, 5\) for regression, got \(2,\)"),
    ],
)
def test_labels_of_another_size_are_refused_and_never_broadcast(labels, problem_type, expected):
    with pytest.raises(ValueError, match=expected):
        model.classification_loss(torch.randn(2, 5), labels, problem_type)


def test_positions_of_an_unchanged_square_interpolate_as_those_of_transformers():
    theirs = published(transformers.VivitForVideoClassification, TINY)
    ours = copy_of(theirs)
    x = clips(theirs.config)

    expected = theirs(x, interpolate_pos_encoding=True).logits
    assert_close(ours(x, interpolate_pos_encoding=True).logits, expected)


def test_new_weights_are_drawn_as_published():
    own = {**TINY, "hidden_size": 96, "intermediate_size": 200, "initializer_range": 0.05}
    torch.manual_seed(0)
    ours = to_published(VivitModel(VivitConfig(**own)).state_dict())
    theirs = transformers.VivitModel(transformers.VivitConfig(**own))
    theirs = to_published(from_published(theirs.state_dict()))

    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if expected.std() == 0:
            assert torch.equal(ours[name], expected), name  # zeros or ones
        else:
            assert ours[name].mean().abs() < 0.005, name
            assert ours[name].std().item() == pytest.approx(0.05, rel=0.06), name


def test_a_new_classifier_is_drawn_as_published():
    torch.manual_seed(0)
    classifier = VivitForVideoClassification(VivitConfig(**{**TINY, "num_labels": 500})).classifier

    assert classifier.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not classifier.bias.any()


# Attention implementations and dropout


@pytest.mark.parametrize("model_class", [VivitModel, VivitForVideoClassification])
def test_an_unknown_implementation_is_told_with_the_known_ones(model_class):
    with pytest.raises(ValueError, match="must be one of sdpa, eager, got 'flash'"):
        model_class(VivitConfig(**TINY), attn_implementation="flash")


@pytest.mark.parametrize("model_class", [VivitModel, VivitForVideoClassification])
def test_attentions_of_sdpa_are_refused_with_the_way_to_have_them(model_class):
    ours = model_class(VivitConfig(**TINY))
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        ours(clips(ours.config), output_attentions=True)


def test_sdpa_is_the_default_and_calls_the_fused_function(monkeypatch):
    called = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or fused(*a, **k))
    ours = VivitForVideoClassification(VivitConfig(**TINY))
    ours(clips(ours.config))

    assert len(called) == ours.config.num_hidden_layers


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_active_in_training_and_only_there(dropout, implementation):
    torch.manual_seed(0)
    ours = VivitModel(VivitConfig(**TINY, **{dropout: 0.5}), attn_implementation=implementation)
    without = VivitModel(VivitConfig(**TINY), attn_implementation=implementation)
    without.load_state_dict(ours.state_dict())
    x = clips(ours.config)

    ours.train()
    assert not torch.allclose(ours(x).last_hidden_state, ours(x).last_hidden_state, atol=1e-3)
    ours.eval()
    assert torch.equal(ours(x).last_hidden_state, without(x).last_hidden_state)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_where_transformers_has_it(dropout, implementation):
    """To drop everything is not random, so the two can be compared in training."""
    theirs = published(transformers.VivitModel, {**TINY, dropout: 1.0}).train()
    ours = copy_of(theirs, implementation).train()
    x = clips(ours.config)
    got, expected = ours(x, output_hidden_states=True), theirs(x, output_hidden_states=True)

    assert_close(got.last_hidden_state, expected.last_hidden_state)
    for layer, expected_of_layer in zip(got.hidden_states, expected.hidden_states):
        assert (layer - expected_of_layer).abs().max() < 1e-4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_dropout_keeps_the_mean(implementation):
    """What is left is scaled up: over many draws the mean is what evaluation gives."""
    torch.manual_seed(0)
    own = VivitConfig(**TINY, attention_probs_dropout_prob=0.3)
    attention = model.Attention(own, attn_implementation=implementation)
    x = torch.randn(1, 9, own.hidden_size)
    with torch.no_grad():
        draws = attention.train()(x.expand(4000, -1, -1))
        expected = attention.eval()(x)[0]

    assert draws.std(0).mean() > 0.02
    assert (draws.mean(0) - expected).abs().max() < 5 * draws.std(0).max() / math.sqrt(len(draws))


# Interpolated positions


GRID, DIM = (3, 4, 5), 6


def position_table(table: torch.Tensor) -> torch.Tensor:
    """(1, N, D) from (T', H', W', D), with a CLS token of tens."""
    cls = torch.full((1, 1, table.shape[-1]), 10.0, dtype=table.dtype)
    return torch.cat([cls, table.reshape(1, -1, table.shape[-1])], dim=1)


def random_table() -> torch.Tensor:
    return torch.randn(*GRID, DIM, generator=torch.Generator().manual_seed(2))


def interpolated(table: torch.Tensor, new_grid: tuple[int, int, int]) -> torch.Tensor:
    """The (T', H', W', D) table for `new_grid`; what CLS got is checked in passing."""
    positions = model.interpolate_positions(position_table(table), GRID, new_grid)

    assert positions.shape == (1, 1 + math.prod(new_grid), table.shape[-1])
    assert (positions[:, 0] == 10).all()
    return positions[0, 1:].view(*new_grid, -1)


def resized(values: torch.Tensor, length: int, mode: str) -> torch.Tensor:
    """A line of values; its bicubic is that of a picture that is constant across."""
    if mode == "linear":
        return F.interpolate(values[None, None], size=length, mode="linear", align_corners=False)[0, 0]
    picture = values[None, None, :, None].expand(1, 1, -1, 4)
    return F.interpolate(picture, size=(length, 4), mode="bicubic", align_corners=False)[0, 0, :, 0]


def test_an_unchanged_grid_keeps_its_positions():
    positions = position_table(random_table())
    assert model.interpolate_positions(positions, GRID, GRID) is positions


@pytest.mark.parametrize("new_grid", [(3, 8, 10), (3, 2, 5), (6, 4, 5), (2, 7, 3), (1, 1, 1)])
def test_a_constant_table_stays_constant(new_grid):
    table = torch.arange(DIM).float().expand(*GRID, DIM)
    assert torch.allclose(interpolated(table, new_grid), torch.arange(DIM).float(), atol=1e-5)


@pytest.mark.parametrize("size", [(8, 10), (2, 5), (4, 9)])
def test_each_time_step_is_a_bicubic_resize_of_its_own_where_the_frames_are_unchanged(size):
    table = random_table()
    got = interpolated(table, (GRID[0], *size))

    for step in range(GRID[0]):
        picture = table[step].permute(2, 0, 1)[None]
        expected = F.interpolate(picture, size=size, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
        assert torch.allclose(got[step], expected, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 9])
def test_each_place_is_a_linear_resize_in_time_where_the_size_is_unchanged(steps):
    table = random_table()
    got = interpolated(table, (steps, *GRID[1:]))

    for row in range(GRID[1]):
        for column in range(GRID[2]):
            for channel in range(DIM):
                expected = resized(table[:, row, column, channel], steps, "linear")
                assert torch.allclose(got[:, row, column, channel], expected, atol=1e-6)


def test_a_separable_table_is_resized_axis_by_axis():
    """Time, height and width each vary in their own way, so a table whose axes are mixed up cannot pass."""
    steps, width = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0])
    height = torch.tensor([1.0, 2.0, 4.0, 3.0])
    table = (steps[:, None, None] * height[:, None] * width)[..., None]
    expected = (
        resized(steps, 5, "linear")[:, None, None]
        * resized(height, 7, "bicubic")[:, None]
        * resized(width, 8, "bicubic")
    )

    assert torch.allclose(interpolated(table, (5, 7, 8))[..., 0], expected, atol=1e-4)


def test_time_never_leaves_the_range_of_what_was_learned():
    table = random_table()
    assert interpolated(table, (11, *GRID[1:])).abs().max() <= table.abs().max()


def test_half_precision_positions_are_interpolated_in_full_precision():
    table = random_table().half()
    expected = interpolated(table.float(), (5, 7, 8)).half()

    assert torch.equal(interpolated(table, (5, 7, 8)), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_model_takes_other_frames_and_sizes_when_asked_to(implementation):
    ours = VivitForVideoClassification(VivitConfig(**TINY), attn_implementation=implementation).eval()
    outputs = ours(torch.randn(1, 6, 3, 48, 64), interpolate_pos_encoding=True, output_hidden_states=True)

    assert outputs.logits.shape == (1, 5)
    assert outputs.hidden_states[0].shape == (1, 1 + 3 * 3 * 4, 24)


def test_interpolated_positions_are_trained_with():
    ours = VivitForVideoClassification(VivitConfig(**TINY))
    x = torch.randn(1, 6, 3, 48, 64)
    ours(x, labels=torch.tensor([0]), interpolate_pos_encoding=True).loss.backward()

    assert (ours.vivit.embedding.position_embeddings.grad.abs().sum(-1) > 0).all()


# What comes in and what comes out


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (1, 2, 4, 3, 32, 32)])
@pytest.mark.parametrize("interpolate", [False, True])
def test_another_rank_is_refused_with_the_shape_expected(shape, interpolate):
    ours = VivitModel(VivitConfig(**TINY))
    with pytest.raises(ValueError) as caught:
        ours(torch.zeros(shape), interpolate_pos_encoding=interpolate)
    assert "(B, 4, 3, 32, 32)" in str(caught.value) and str(shape) in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 4, 1, 32, 32), (1, 3, 4, 32, 32), (1, 4, 32, 32, 3)])
@pytest.mark.parametrize("interpolate", [False, True])
def test_another_number_of_channels_is_refused_and_interpolation_not_offered(shape, interpolate):
    ours = VivitModel(VivitConfig(**TINY))
    with pytest.raises(ValueError, match=r"\(B, 4, 3, 32, 32\)") as caught:
        ours(torch.zeros(shape), interpolate_pos_encoding=interpolate)
    assert str(shape) in str(caught.value)
    assert "interpolate_pos_encoding" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 6, 3, 32, 32), (1, 4, 3, 48, 32), (1, 4, 3, 32, 48)])
def test_other_frames_and_sizes_are_refused_with_the_way_to_permit_them(shape):
    ours = VivitModel(VivitConfig(**TINY))
    with pytest.raises(ValueError, match=r"\(B, 4, 3, 32, 32\).*interpolate_pos_encoding=True") as caught:
        ours(torch.zeros(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 5, 3, 32, 32), (1, 4, 3, 40, 32), (1, 4, 3, 32, 33), (1, 4, 3, 0, 32)])
def test_a_clip_that_tubelets_do_not_fill_is_refused(shape):
    ours = VivitModel(VivitConfig(**TINY))
    with pytest.raises(ValueError, match=r"multiples of the tubelet \(2, 16, 16\)"):
        ours(torch.zeros(shape), interpolate_pos_encoding=True)


def test_an_output_is_read_by_attribute_name_or_number():
    ours = VivitForVideoClassification(VivitConfig(**TINY)).eval()
    outputs = ours(clips(ours.config))

    assert outputs["logits"] is outputs.logits is outputs[0] is outputs[-1]
    assert outputs.loss is None and "loss" not in outputs
    assert outputs.to_tuple() == outputs[:] == (outputs.logits,)
    assert list(outputs) == ["logits"] and len(outputs) == 1
    with pytest.raises(KeyError):
        outputs["loss"]


def test_the_loss_comes_first_as_trainers_expect():
    ours = VivitForVideoClassification(VivitConfig(**TINY))
    outputs = ours(clips(ours.config), labels=torch.tensor([1, 2]))

    assert outputs[0] is outputs.loss
    assert list(outputs) == ["loss", "logits"]


def test_without_a_pooling_layer_there_is_no_pooler_output():
    ours = VivitModel(VivitConfig(**TINY), add_pooling_layer=False)
    assert ours(clips(ours.config)).pooler_output is None


def test_device_dtype_and_config_can_be_asked():
    own = VivitConfig(**TINY)
    ours = VivitForVideoClassification(own)

    assert ours.config is own
    assert ours.device == torch.device("cpu")
    assert ours.dtype == torch.float32
    assert ours.to(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_stays_near(implementation):
    theirs = published(transformers.VivitForVideoClassification, TINY)
    ours = copy_of(theirs, implementation)
    x = clips(ours.config)
    expected = ours(x).logits

    assert_close(ours.to(torch.bfloat16)(x.bfloat16()).logits.float(), expected, 0.1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_clip_is_classified_alike_alone_and_in_a_batch(implementation):
    ours = copy_of(published(transformers.VivitForVideoClassification, TINY), implementation)
    x = clips(ours.config, 3)

    assert_close(torch.cat([ours(clip[None]).logits for clip in x]), ours(x).logits, 1e-5)
