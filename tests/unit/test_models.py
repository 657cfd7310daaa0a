"""The models against transformers: outputs, gradients, losses and initial weights. Also what transformers lacks.

B  clips             T', H', W'  tubelets along time, height and width
D  hidden size       N  tokens of a sequence, including CLS
h  attention heads   S  tokens of a time step
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from handler import VivitConfig, VivitForVideoClassification, VivitModel
from handler.checkpoints.names import from_published, to_published
from handler.models import ACTIVATION_NAMES, ATTENTION_IMPLEMENTATIONS
from handler.models import layers as layers_module
from handler.models.activations import ACTIVATIONS
from handler.models.cost import count_multiply_adds, count_parameters
from handler.models.embedding import interpolate_positions, uniform_frame_indices
from handler.models.layers import ATTENTION_FUNCTIONS, SPACE, TIME, Attention, Layer, run_layers
from handler.models.losses import classification_loss
from tests.support.oracle import TINY, published

FIVE_LABELS = {**TINY, "num_labels": 5}
VARIANTS = {
    "tiny": {},
    "not square": {"image_size": (32, 48)},
    "no bias of query, key and value": {"qkv_bias": False},
    "one head, one channel": {"num_attention_heads": 1, "num_channels": 1},
    "other tubelets": {"num_frames": 6, "tubelet_size": (3, 8, 16)},
    "other activation and epsilon": {"hidden_act": "relu", "layer_norm_eps": 1e-2},
}

FOUR_HEADS = {**FIVE_LABELS, "num_attention_heads": 4, "image_size": (32, 48)}
MODELS = {
    "spatiotemporal": {},
    "spatiotemporal, mean": {"classifier_pooling": "mean"},
    "factorised encoder": {"attention_type": "factorised_encoder", "num_temporal_layers": 3},
    "factorised encoder, mean": {"attention_type": "factorised_encoder", "classifier_pooling": "mean"},
    "factorised self-attention": {"attention_type": "factorised_self_attention"},
    "space before time": {"attention_type": "factorised_self_attention", "attention_order": "space_time"},
    "factorised dot-product": {"attention_type": "factorised_dot_product"},
    "uniform frames": {"tubelet_embedding": "uniform_frames"},
}

each_model = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
each_implementation = pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)


def copy_of(theirs, attn_implementation: str = "sdpa"):
    """Our model with the weights of theirs."""
    model_class = VivitModel if isinstance(theirs, transformers.VivitModel) else VivitForVideoClassification
    config = VivitConfig.from_dict(theirs.config.to_dict())
    ours = model_class(config, attn_implementation=attn_implementation)
    ours.load_state_dict(from_published(theirs.state_dict()))
    return ours.eval()


def new_model(model_class=VivitForVideoClassification, *, attn_implementation: str = "sdpa", **config):
    return model_class(VivitConfig(**{**FIVE_LABELS, **config}), attn_implementation=attn_implementation).eval()


def random_clips(config, count: int = 2) -> torch.Tensor:
    """(count, T, C, H, W) for a configuration of transformers or of ours."""
    size = config.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, config.num_frames, config.num_channels, height, width, generator=generator)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    largest = theirs.abs().max()
    assert largest > 10 * tolerance, "the values are too small to compare"
    assert (ours - theirs).abs().max() < tolerance * max(1, largest)


# Against transformers


def test_activations_have_their_names():
    assert sorted(ACTIVATIONS) == sorted(ACTIVATION_NAMES)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_matches_transformers(name):
    x = torch.linspace(-12, 12, 4001)
    assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), 2e-6)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_all_outputs_match_transformers(variant):
    theirs = published(**variant)
    x = random_clips(theirs.config)
    ours = copy_of(theirs, "eager")(x, output_hidden_states=True, output_attentions=True)
    expected = theirs(x, output_hidden_states=True, output_attentions=True)

    assert list(ours) == list(expected) == ["logits", "hidden_states", "attentions"]
    assert_close(ours.logits, expected.logits)
    assert_close(copy_of(theirs, "sdpa")(x).logits, expected.logits)
    for name, count in (("hidden_states", 3), ("attentions", 2)):
        assert len(ours[name]) == len(expected[name]) == count
        for layer, expected_of_layer in zip(ours[name], expected[name]):
            assert_close(layer, expected_of_layer)


@pytest.mark.parametrize("variant", [{}, {"pooler_act": "gelu", "pooler_output_size": 7}])
def test_encoder_matches_transformers(variant):
    theirs = published(transformers.VivitModel, **variant)
    x = random_clips(theirs.config)
    ours, expected = copy_of(theirs)(x), theirs(x)
    assert list(ours) == list(expected)
    assert_close(ours.last_hidden_state, expected.last_hidden_state)
    assert_close(ours.pooler_output, expected.pooler_output)


def test_logits_of_base_width_within_3e_6():
    theirs = published(num_frames=2, image_size=64, hidden_size=768, num_attention_heads=12, intermediate_size=3072)
    x = random_clips(theirs.config)
    with torch.no_grad():
        assert_close(copy_of(theirs)(x).logits, theirs(x).logits, 3e-6)


@each_implementation
def test_loss_and_gradients_match_transformers(implementation):
    theirs = published(qkv_bias=False, image_size=(32, 48)).train()
    ours = copy_of(theirs, implementation).train()
    x, labels = random_clips(theirs.config), torch.tensor([3, 1])
    expected, outputs = theirs(x, labels=labels), ours(x, labels=labels)
    expected.loss.backward()
    outputs.loss.backward()

    assert list(outputs) == ["loss", "logits"] and outputs[0] is outputs.loss
    assert_close(outputs.loss, expected.loss)
    gradients = to_published({name: weight.grad for name, weight in ours.named_parameters()})
    theirs = to_published(from_published({name: weight.grad for name, weight in theirs.named_parameters()}))
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4)
    assert sum(gradient.abs().max() > 1e-2 for gradient in gradients.values()) > len(gradients) / 2


@pytest.mark.parametrize(
    "config, labels",
    [
        ({"problem_type": "single_label_classification"}, torch.tensor([3, -100])),
        ({"problem_type": "multi_label_classification"}, torch.eye(5)[:2]),
        ({"problem_type": "regression"}, torch.linspace(0, 1, 10).view(2, 5)),
        ({"problem_type": "regression", "num_labels": 1}, torch.tensor([[0.5], [-1.0]])),
        ({}, torch.tensor([3, 1])),
        ({}, torch.full((2, 5), 0.25)),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0])),
    ],
)
def test_loss_matches_transformers(config, labels):
    theirs = published(**config)
    ours, x = copy_of(theirs), random_clips(theirs.config)
    problem_type = ours.config.problem_type
    assert_close(ours(x, labels=labels).loss, theirs(x, labels=labels).loss)
    assert ours.config.problem_type == problem_type  # inferred from the labels of each call, never stored


def test_loss_of_several_heads_is_mean_of_cross_entropies():
    heads = {"noun": 4, "verb": 3}
    model = VivitForVideoClassification(VivitConfig(**TINY, label_heads=heads)).eval()
    x, labels = random_clips(model.config), np.array([[3, 0], [1, 2]])
    outputs = model(x, labels=torch.from_numpy(labels).int())
    logits = outputs.logits.detach().numpy().astype(np.float64)
    assert logits.shape == (2, 7)

    def cross_entropy(logits, labels):
        return (np.log(np.exp(logits).sum(1)) - np.take_along_axis(logits, labels[:, None], 1)[:, 0]).mean()

    nouns, verbs = cross_entropy(logits[:, :4], labels[:, 0]), cross_entropy(logits[:, 4:], labels[:, 1])
    assert outputs.loss.item() == pytest.approx((nouns + verbs) / 2, rel=1e-5)

    labels[0, 1] = -100  # no verb: the other clip's counts alone
    verbs = cross_entropy(logits[1:, 4:], labels[1:, 1])
    assert model(x, labels=torch.from_numpy(labels)).loss.item() == pytest.approx((nouns + verbs) / 2, rel=1e-5)

    with pytest.raises(ValueError, match=r"expected labels of shape \(2, 2\) for noun, verb, got \(2, 7\)"):
        model(x, labels=torch.zeros(2, 7))


@each_implementation
@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_where_transformers_has_it(dropout, implementation):
    """Compares in train mode with dropout 1, which is not random, and in eval mode."""
    theirs = published(transformers.VivitModel, **{dropout: 1.0})
    ours, x = copy_of(theirs, implementation), random_clips(theirs.config)
    for training in (True, False):
        outputs = ours.train(training)(x, output_hidden_states=True)
        expected = theirs.train(training)(x, output_hidden_states=True)
        assert_close(outputs.last_hidden_state, expected.last_hidden_state)
        for layer, expected_of_layer in zip(outputs.hidden_states, expected.hidden_states):
            torch.testing.assert_close(layer, expected_of_layer, atol=1e-4, rtol=1e-5)


def test_interpolation_to_same_square_matches_transformers():
    theirs = published()
    x = random_clips(theirs.config)
    expected = theirs(x, interpolate_pos_encoding=True).logits
    assert_close(copy_of(theirs)(x, interpolate_pos_encoding=True).logits, expected)


def test_new_weights_distributed_as_in_transformers():
    config = {**FIVE_LABELS, "hidden_size": 96, "intermediate_size": 200, "num_labels": 200, "initializer_range": 0.05}
    torch.manual_seed(0)
    for ours, theirs in (
        (VivitModel, transformers.VivitModel),
        (VivitForVideoClassification, transformers.VivitForVideoClassification),
    ):
        weights = to_published(ours(VivitConfig(**config)).state_dict())
        expected = theirs(transformers.VivitConfig(**config)).state_dict()
        expected = to_published(from_published(expected))
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            if tensor.std() == 0:
                assert torch.equal(weights[name], tensor), name  # zeros or ones
            else:
                assert weights[name].mean().abs() < 0.005, name
                assert weights[name].std().item() == pytest.approx(0.05, rel=0.06), name


# Attention and the last layer


def test_every_attention_implementation_has_function():
    assert tuple(ATTENTION_FUNCTIONS) == ATTENTION_IMPLEMENTATIONS


@pytest.mark.parametrize("model_class", [VivitModel, VivitForVideoClassification])
def test_attention_implementation_checked(model_class):
    with pytest.raises(ValueError, match="must be one of sdpa, eager, got 'flash'"):
        new_model(model_class, attn_implementation="flash")
    ours = new_model(model_class)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        ours(random_clips(ours.config), output_attentions=True)


@pytest.mark.parametrize("implementation, calls", [(None, 2), ("sdpa", 2), ("eager", 0)])
def test_only_sdpa_calls_fused_function(monkeypatch, implementation, calls):
    called, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or fused(*a, **k))
    chosen = {"attn_implementation": implementation} if implementation else {}
    ours = VivitForVideoClassification(VivitConfig(**FIVE_LABELS), **chosen)
    ours(random_clips(ours.config))
    assert len(called) == calls


@each_implementation
def test_attention_dropout_keeps_mean(implementation):
    torch.manual_seed(0)
    config = VivitConfig(**FIVE_LABELS, attention_probs_dropout_prob=0.3)
    attention = Attention(config, attn_implementation=implementation)
    x = torch.randn(1, 9, config.hidden_size)
    with torch.no_grad():
        draws, _ = attention.train()(x.expand(4000, -1, -1))  # (4000, N, D)
        expected = attention.eval()(x)[0][0]  # (N, D)
    assert draws.std(0).mean() > 0.02
    assert (draws.mean(0) - expected).abs().max() < 5 * draws.std(0).max() / math.sqrt(len(draws))


@each_implementation
def test_cls_only_equals_cls_of_all_tokens(implementation):
    ours = copy_of(published(transformers.VivitModel), implementation)
    x = random_clips(ours.config)
    cls_only, everything = ours(x, cls_only=True), ours(x)
    assert_close(cls_only.last_hidden_state, everything.last_hidden_state[:, :1])
    assert_close(cls_only.pooler_output, everything.pooler_output)


def test_classifier_computes_only_cls_in_last_layer():
    ours, tokens = new_model(), []
    for layer in ours.vivit.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[1]))
    ours(random_clips(ours.config))
    ours(random_clips(ours.config), output_hidden_states=True)
    assert tokens == [9, 1, 9, 9]


# The paper's models


def random_model(*, attn_implementation: str = "sdpa", **config) -> VivitForVideoClassification:
    """A model in which all parameters are random, also those that are initialized with 0 or 1."""
    torch.manual_seed(0)
    model = VivitForVideoClassification(
        VivitConfig(**{**FOUR_HEADS, **config}), attn_implementation=attn_implementation
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
    return model.eval()


@each_model
def test_eager_and_sdpa_agree(changes):
    losses = []
    for implementation in ATTENTION_IMPLEMENTATIONS:
        model = random_model(attn_implementation=implementation, **changes)
        x = random_clips(model.config).requires_grad_()
        outputs = model(x, labels=torch.tensor([3, 1]))
        outputs.loss.backward()
        losses.append((outputs.logits, x.grad, {name: weight.grad for name, weight in model.named_parameters()}))
    (logits, x_gradient, gradients), (expected_logits, expected_x_gradient, expected_gradients) = losses
    assert_close(logits, expected_logits)
    torch.testing.assert_close(x_gradient, expected_x_gradient, atol=1e-6, rtol=1e-4)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)


def attend_masked(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """The obvious version: all tokens (B, T', S, D) attend to all; scores of tokens off the axis are masked."""
    time, space = x.shape[1:3]
    steps, places = torch.arange(time).repeat_interleave(space), torch.arange(space).repeat(time)
    same = {TIME: places[:, None] == places, SPACE: steps[:, None] == steps}  # (N, N): tokens on a line along the axis
    q, k, v = attention.qkv(x.flatten(1, 2)).chunk(3, dim=-1)  # 3 x (B, N, D)
    width = q.shape[-1] // attention.heads
    values = []
    for head in range(attention.heads):
        channels = slice(head * width, (head + 1) * width)
        axis = attention.axes[head * len(attention.axes) // attention.heads]
        scores = q[..., channels] @ k[..., channels].transpose(1, 2) / math.sqrt(width)  # (B, N, N)
        values.append(scores.masked_fill(~same[axis], -math.inf).softmax(-1) @ v[..., channels])
    return attention.output(torch.cat(values, dim=-1)).view_as(x)


@each_implementation
@pytest.mark.parametrize("axes", [(TIME,), (SPACE,), (TIME, SPACE)])
def test_attention_along_axes_equals_masked_attention(axes, implementation):
    torch.manual_seed(0)
    attention = Attention(VivitConfig(**FOUR_HEADS), attn_implementation=implementation, axes=axes)
    x = torch.randn(2, 3, 5, 24)
    attended, weights = attention(x)
    torch.testing.assert_close(attended, attend_masked(attention, x), atol=1e-6, rtol=1e-5)
    if implementation == "eager":
        heads = 4 // len(axes)
        shapes = {TIME: (2, 5, heads, 3, 3), SPACE: (2, 3, heads, 5, 5)}
        assert [tuple(of_axis.shape) for of_axis in weights] == [shapes[axis] for axis in axes]


@pytest.mark.parametrize("order", ["time_space", "space_time"])
def test_factorised_self_attention_layer_has_two_attentions_and_one_mlp(order):
    layer = random_model(attention_type="factorised_self_attention", attention_order=order).vivit.layers[1]
    x = torch.randn(2, 3, 5, 24)
    expected = x
    for axis in order.split("_"):
        layernorm, attention = getattr(layer, f"layernorm_{axis}"), getattr(layer, f"attention_{axis}")
        assert attention.axes == ({"time": TIME, "space": SPACE}[axis],)
        expected = expected + attention(layernorm(expected))[0]
    expected = expected + layer.mlp(layer.layernorm_after(expected))
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_first_factorised_encoder_is_spatiotemporal_model_of_each_time_step(pooling):
    model = random_model(attention_type="factorised_encoder", classifier_pooling=pooling)
    step_config = dataclasses.replace(
        model.config, attention_type="spatiotemporal", num_temporal_layers=None, num_frames=2
    )
    step_model = VivitModel(step_config, add_pooling_layer=False).eval()
    step_model.load_state_dict(
        {name: tensor for name, tensor in model.vivit.state_dict().items() if not name.startswith("temporal.")}
    )
    x = random_clips(model.config)
    steps = [step_model.pool(step_model(clips).last_hidden_state) for clips in x.split(2, dim=1)]
    received = []
    model.vivit.temporal.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
    logits = model(x).logits
    assert_close(received[0], torch.stack(steps, dim=1))

    temporal = model.vivit.temporal
    hidden = torch.stack(steps, dim=1)  # (B, T', D)
    if pooling == "cls":
        hidden = torch.cat([temporal.embedding.cls_token.expand(2, 1, -1), hidden], dim=1)
    hidden = run_layers(temporal.layers, hidden + temporal.embedding.position_embeddings).last_hidden_state
    hidden = temporal.layernorm(hidden)
    assert_close(logits, model.classifier(hidden[:, 0] if pooling == "cls" else hidden.mean(1)))


SHAPES = {  # 2 clips, T' = 2, S = 6 tubelets per time step, D = 24, 2 layers
    "spatiotemporal": ([(2, 13, 24)] * 3, [(2, 4, 13, 13)] * 2),
    "factorised_encoder": (
        [(2, 2, 7, 24)] * 3 + [(2, 3, 24)] * 5,
        [(2, 2, 4, 7, 7)] * 2 + [(2, 4, 3, 3)] * 4,
    ),
    "factorised_self_attention": ([(2, 12, 24)] * 3, [(2, 6, 4, 2, 2), (2, 2, 4, 6, 6)] * 2),
    "factorised_dot_product": ([(2, 12, 24)] * 3, [(2, 6, 2, 2, 2), (2, 2, 2, 6, 6)] * 2),
}


@pytest.mark.parametrize("attention_type", SHAPES)
def test_hidden_states_and_attentions_have_documented_shapes(attention_type):
    model = random_model(attn_implementation="eager", attention_type=attention_type)
    x = random_clips(model.config)
    outputs = model.vivit(x, output_hidden_states=True, output_attentions=True)
    hidden_shapes, attention_shapes = SHAPES[attention_type]
    assert [tuple(state.shape) for state in outputs.hidden_states] == hidden_shapes
    assert [tuple(weights.shape) for weights in outputs.attentions] == attention_shapes
    assert outputs.last_hidden_state.shape == hidden_shapes[-1]
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert_close(model(x).logits, model.classifier(model.vivit.pool(outputs.last_hidden_state)))


@each_model
def test_every_model_interpolates_positions(changes):
    model = random_model(**changes)
    x = random_clips(model.config)
    assert torch.equal(model(x, interpolate_pos_encoding=True).logits, model(x).logits)
    outputs = model(torch.randn(1, 6, 3, 48, 64), labels=torch.tensor([0]), interpolate_pos_encoding=True)
    outputs.loss.backward()
    positions = [weight for name, weight in model.named_parameters() if name.endswith("position_embeddings")]
    assert len(positions) == (2 if "encoder" in model.config.attention_type else 1)
    assert all((weight.grad.abs().sum(-1) > 0).all() for weight in positions)


def test_factorised_encoder_computes_only_cls_in_last_layers():
    model, tokens = random_model(attention_type="factorised_encoder", num_temporal_layers=2), []
    for layer in (*model.vivit.layers, *model.vivit.temporal.layers):
        layer.mlp.register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[-2]))
    x = random_clips(model.config)
    cls_only, everything = model(x).logits, model(x, output_hidden_states=True).logits
    assert tokens == [7, 1, 3, 1, 7, 7, 3, 3]
    assert_close(cls_only, everything)


def test_cls_only_requires_cls():
    model = random_model(attention_type="factorised_dot_product")
    with pytest.raises(ValueError, match="requires a model with a CLS token.*'mean'"):
        model.vivit(random_clips(model.config), cls_only=True)


def test_pooler_on_mean_of_tokens():
    torch.manual_seed(0)
    model = VivitModel(VivitConfig(**FOUR_HEADS, attention_type="factorised_dot_product")).eval()
    outputs = model(random_clips(model.config))
    assert_close(outputs.pooler_output, model.pooler(outputs.last_hidden_state.mean(1)).tanh())


def test_uniform_frames_have_equal_distances():
    assert uniform_frame_indices(32, count=16) == [2, 4, 6, 8, 9, 11, 13, 15, 17, 19, 21, 23, 24, 26, 28, 30]
    assert uniform_frame_indices(10, count=3) == [2, 5, 8]  # 2.5, 5, 7.5: halves are rounded to even, as by NumPy
    assert uniform_frame_indices(6, count=1) == [3]
    assert uniform_frame_indices(4, count=4) == [0, 1, 2, 3]


def test_uniform_frames_are_embedded_as_images():
    sampled = random_model(tubelet_embedding="uniform_frames", num_frames=8)
    images = random_model(tubelet_size=(1, 16, 16), num_frames=4)
    images.load_state_dict(sampled.state_dict())
    x = random_clips(sampled.config)
    assert_close(sampled(x).logits, images(x[:, [2, 3, 5, 6]]).logits)


def test_many_sequences_attended_in_parts(monkeypatch):
    model = random_model(attention_type="factorised_self_attention")
    x = random_clips(model.config)
    expected = model(x).logits
    sizes, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(layers_module, "MAX_SDPA_SEQUENCES", 5)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **k: sizes.append(len(q)) or fused(q, *a, **k))
    assert_close(model(x).logits, expected)
    assert sizes == [5, 5, 2, 4] * 2


PAPER_COSTS = {  # table 2 of the paper: millions of parameters, billions of multiply-adds
    "spatiotemporal": (88.9, 455.2),
    "factorised_encoder": (115.1, 284.4),
    "factorised_self_attention": (117.3, 372.3),
    "factorised_dot_product": (88.9, 277.1),
}


@pytest.mark.parametrize("attention_type", PAPER_COSTS)
def test_costs_within_1_percent_of_paper(attention_type):
    config = VivitConfig(attention_type=attention_type, num_labels=400)
    parameters, multiply_adds = PAPER_COSTS[attention_type]
    assert count_parameters(config) / 1e6 == pytest.approx(parameters, rel=0.01)
    assert count_multiply_adds(config) / 1e9 == pytest.approx(multiply_adds, rel=0.01)


@each_model
def test_multiply_adds_match_torch_counter(changes):
    with torch.device("meta"):
        model = VivitForVideoClassification(VivitConfig(**FOUR_HEADS, **changes))
        x = torch.empty(1, 4, 3, 32, 48)
    with FlopCounterMode(display=False) as counter:
        model(x, output_hidden_states=True)  # without it, the last layer computes CLS only
    assert 2 * count_multiply_adds(model.config) == counter.get_total_flops()


# Stochastic depth


@each_model
def test_drop_path_only_in_training_and_only_if_positive(changes):
    model, dropping = random_model(**changes), random_model(**changes, drop_path_rate=0.5)
    x = random_clips(model.config)
    assert torch.equal(dropping(x).logits, model(x).logits)
    assert torch.equal(model.train()(x).logits, model.eval()(x).logits)
    torch.manual_seed(1)
    assert not torch.allclose(dropping.train()(x).logits, model(x).logits)
    assert not any(layer.drop_path_prob for layer in model.modules() if isinstance(layer, Layer))


def test_drop_path_grows_linearly_in_each_encoder():
    model = random_model(
        attention_type="factorised_encoder", num_hidden_layers=5, num_temporal_layers=3, drop_path_rate=0.2
    )
    assert [layer.drop_path_prob for layer in model.vivit.layers] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert [layer.drop_path_prob for layer in model.vivit.temporal.layers] == pytest.approx([0, 0.1, 0.2])
    assert random_model(num_hidden_layers=1, drop_path_rate=0.2).vivit.layers[0].drop_path_prob == 0


@pytest.mark.parametrize("attention_type", SHAPES)
def test_drop_path_drops_each_branch_of_each_clip(attention_type):
    """Branches with constant outputs 1, 2 and so on: the sum says which branches a clip kept."""
    clips, layer = 400, random_model(attention_type=attention_type, drop_path_rate=0.25).vivit.layers[-1].train()
    branches = [attention.output for _, attention in layer.attentions] + [layer.mlp.down]
    with torch.no_grad():
        for index, branch in enumerate(branches):
            branch.weight.zero_()
            branch.bias.fill_(0.75 * 2**index)  # kept branches are divided by the probability to keep them
        shape = (clips, 3, 24) if attention_type == "spatiotemporal" else (clips, 2, 3, 24)
        sums = layer(torch.zeros(shape))[0].flatten(1)  # (clips, ...)
    assert torch.equal(sums, sums[:, :1].expand_as(sums))
    kept = torch.stack([sums[:, 0].round().long() >> index & 1 for index in range(len(branches))])
    assert torch.equal(sums[:, 0], (kept * 2 ** torch.arange(len(branches))[:, None]).sum(0).float())
    assert kept.float().mean(1).numpy() == pytest.approx(0.75, abs=0.1)
    assert (kept[0] != kept[-1]).any()


# Interpolated positions


GRID = (3, 4, 5)


def interpolated(table: torch.Tensor, new_grid: tuple[int, int, int]) -> torch.Tensor:
    """Interpolates a (T', H', W', D) table and checks CLS."""
    channels = table.shape[-1]
    cls = torch.full((1, 1, channels), 10.0, dtype=table.dtype)
    positions = torch.cat([cls, table.reshape(1, -1, channels)], dim=1)  # (1, N, D)
    positions = interpolate_positions(positions, grid=GRID, new_grid=new_grid)
    assert positions.shape == (1, 1 + math.prod(new_grid), channels)
    assert (positions[:, 0] == 10).all()
    return positions[0, 1:].view(*new_grid, -1)  # (T', H', W', D)


def resized(values: torch.Tensor, length: int, mode: str) -> torch.Tensor:
    """Resizes a line of values; bicubic as an image that is constant across."""
    if mode == "linear":
        return F.interpolate(values[None, None], size=length, mode="linear", align_corners=False)[0, 0]
    image = values[None, None, :, None].expand(1, 1, -1, 4)
    return F.interpolate(image, size=(length, 4), mode="bicubic", align_corners=False)[0, 0, :, 0]


@pytest.mark.parametrize("new_grid", [(5, 7, 8), (3, 8, 10), (2, 4, 5), (1, 1, 1), GRID])
def test_separable_positions_interpolated_along_each_axis(new_grid):
    """Each axis varies in its own way, so that mixed-up axes give other values. Channels are multiples."""
    time, height = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([1.0, 2.0, 4.0, 3.0])
    width = torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0])
    channels = torch.tensor([1.0, -0.5])
    table = time[:, None, None, None] * height[:, None, None] * width[:, None] * channels
    expected = (
        resized(time, new_grid[0], "linear")[:, None, None, None]
        * resized(height, new_grid[1], "bicubic")[:, None, None]
        * resized(width, new_grid[2], "bicubic")[:, None]
        * channels
    )
    torch.testing.assert_close(interpolated(table, new_grid), expected, atol=1e-4, rtol=0)


def test_half_precision_positions_interpolated_in_float32():
    table = torch.randn(*GRID, 6, generator=torch.Generator().manual_seed(2)).half()
    assert torch.equal(interpolated(table, (5, 7, 8)), interpolated(table.float(), (5, 7, 8)).half())


def test_interpolated_positions_receive_gradients():
    ours = new_model()
    outputs = ours(
        torch.randn(1, 6, 3, 48, 64),
        labels=torch.tensor([0]),
        interpolate_pos_encoding=True,
        output_hidden_states=True,
    )
    outputs.loss.backward()
    assert outputs.hidden_states[0].shape == (1, 1 + 3 * 3 * 4, 24)
    assert (ours.vivit.embedding.position_embeddings.grad.abs().sum(-1) > 0).all()


# Inputs and outputs


@pytest.mark.parametrize("interpolate", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (1, 2, 4, 3, 32, 32), (1, 4, 1, 32, 32), (1, 4, 32, 32, 3)])
def test_wrong_axes_rejected(shape, interpolate):
    with pytest.raises(ValueError, match=r"\(B, 4, 3, 32, 32\)") as caught:
        new_model()(torch.zeros(shape), interpolate_pos_encoding=interpolate)
    assert str(shape) in str(caught.value)
    assert "interpolate_pos_encoding" not in str(caught.value)  # would not help


@pytest.mark.parametrize("shape", [(1, 6, 3, 32, 32), (1, 4, 3, 48, 32), (1, 4, 3, 32, 48)])
def test_other_clip_size_requires_interpolation(shape):
    with pytest.raises(ValueError, match=r"\(B, 4, 3, 32, 32\).*interpolate_pos_encoding=True") as caught:
        new_model()(torch.zeros(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 5, 3, 32, 32), (1, 4, 3, 40, 32), (1, 4, 3, 32, 33), (1, 4, 3, 0, 32)])
def test_clip_size_must_be_multiple_of_tubelet(shape):
    with pytest.raises(ValueError, match=r"multiples of the tubelet \(2, 16, 16\)"):
        new_model()(torch.zeros(shape), interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    "labels, problem_type, message",
    [
        (torch.tensor([1, 2, 3]), None, r"shape \(2,\) for single_label_classification, got \(3,\)"),
        (torch.ones(2, 4), None, r"shape \(2, 5\) for multi_label_classification, got \(2, 4\)"),
        (torch.ones(2), "regression", r"shape \(2, 5\) for regression, got \(2,\)"),
    ],
)
def test_labels_of_wrong_size_rejected(labels, problem_type, message):
    with pytest.raises(ValueError, match=message):
        classification_loss(torch.randn(2, 5), labels, problem_type)


def test_bool_and_int32_labels():
    logits = torch.randn(2, 5)
    expected = classification_loss(logits, torch.eye(5)[:2])
    assert torch.equal(classification_loss(logits, torch.eye(5)[:2].bool()), expected)
    expected = classification_loss(logits, torch.tensor([3, 1]))
    assert torch.equal(classification_loss(logits, torch.tensor([3, 1], dtype=torch.int32)), expected)


def test_output_read_by_attribute_name_or_position():
    ours = new_model()
    outputs = ours(random_clips(ours.config))
    assert outputs["logits"] is outputs.logits is outputs[0] is outputs[-1]
    assert outputs.loss is None and "loss" not in outputs
    assert outputs.to_tuple() == outputs[:] == (outputs.logits,)
    assert list(outputs) == ["logits"] and len(outputs) == 1
    with pytest.raises(KeyError):
        outputs["loss"]


def test_no_pooler_output_without_pooling_layer():
    ours = VivitModel(VivitConfig(**FIVE_LABELS), add_pooling_layer=False)
    assert list(ours(random_clips(ours.config))) == ["last_hidden_state"]


@each_implementation
def test_bfloat16_close_to_float32(implementation):
    ours = copy_of(published(), implementation)
    x = random_clips(ours.config)
    expected = ours(x).logits
    assert (ours.device, ours.dtype) == (torch.device("cpu"), torch.float32)
    assert ours.bfloat16().dtype == torch.bfloat16
    assert_close(ours(x.bfloat16()).logits.float(), expected, 0.1)


@each_implementation
def test_logits_independent_of_batch(implementation):
    ours = copy_of(published(), implementation)
    x = random_clips(ours.config, 3)
    assert_close(torch.cat([ours(clip[None]).logits for clip in x]), ours(x).logits)
