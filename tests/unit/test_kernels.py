"""Inference kernels against torch's own functions and the unprepared model.

B  clips    N  tokens of a clip    D  hidden size
"""

import copy
import pickle
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as checkpoint_activations

from handler import VideoClassifier, VivitConfig, VivitForVideoClassification, VivitImageProcessor, kernels
from handler.checkpoints.names import from_published
from handler.kernels import chunked, cpuinfo, onednn, parallel, prepare_for_inference, start_threads
from handler.kernels.int8 import Int8Linear, quantize_linears
from handler.options import HandlerOptions

needs_onednn = pytest.mark.skipif(not onednn.works(torch.float32), reason="this torch has no oneDNN")
needs_bfloat16 = pytest.mark.skipif(
    not onednn.works(torch.bfloat16), reason="oneDNN multiplies no bfloat16 on this processor"
)

# 513 tokens: enough for every kernel.
CONFIG = {
    "image_size": 32,
    "num_frames": 8,
    "tubelet_size": (1, 4, 4),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_labels": 5,
}


@pytest.fixture
def torch_threads():
    """torch_threads(count) until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def use_onednn(monkeypatch, *dtypes):
    """Uses oneDNN for these dtypes only, on any processor."""
    monkeypatch.setattr(onednn, "is_faster", lambda dtype: dtype in dtypes)


@pytest.fixture
def forced_onednn(monkeypatch):
    """Uses oneDNN for float32; returns a list with one item per multiplication."""
    calls, linear = [], onednn.linear
    use_onednn(monkeypatch, torch.float32)
    monkeypatch.setattr(onednn, "linear", lambda *tensors, **how: calls.append(1) or linear(*tensors, **how))
    return calls


@pytest.fixture
def chunks(monkeypatch):
    """A list with the size of each chunk of tokens that ChunkedMLP computes."""
    sizes, apply_in_chunks = [], chunked.apply_in_chunks

    def apply_and_count(function, x, **options):
        return apply_in_chunks(lambda chunk: sizes.append(len(chunk)) or function(chunk), x, **options)

    monkeypatch.setattr(chunked, "apply_in_chunks", apply_and_count)
    return sizes


def make_model(**changes) -> VivitForVideoClassification:
    torch.manual_seed(0)
    model = VivitForVideoClassification(VivitConfig(**{**CONFIG, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def prepared(model, **options):
    model = copy.deepcopy(model)
    prepare_for_inference(model, **options)
    return model


def random_clips(count: int = 2) -> torch.Tensor:
    """(count, T, C, H, W)"""
    return torch.randn(count, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# Numbers


@needs_onednn
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False, "num_attention_heads": 1}])
@pytest.mark.parametrize("mode, threads", [(torch.inference_mode, 3), (torch.no_grad, 1), (torch.no_grad, 2)])
@pytest.mark.parametrize("by_onednn", [False, True])
def test_prepared_logits_match_transformers(
    forced_onednn, chunks, torch_threads, monkeypatch, by_onednn, mode, threads, changes
):
    use_onednn(monkeypatch, *[torch.float32] * by_onednn)
    torch_threads(threads)
    model = make_model(**changes)
    theirs = transformers.VivitForVideoClassification(transformers.VivitConfig(**{**CONFIG, **changes})).eval()
    model.load_state_dict(from_published(theirs.state_dict()))
    prepare_for_inference(model)
    x = random_clips()
    with mode():
        torch.testing.assert_close(model(x).logits, theirs(x).logits, atol=3e-6, rtol=0)
    assert bool(forced_onednn) == by_onednn
    assert sum(chunks) == 2 * 513 and max(chunks) <= 512 and len(chunks) % threads == 0


@needs_onednn
@pytest.mark.parametrize("tokens, block", [(600, 256), (512, 128), (515, 1000)])
def test_onednn_attention_matches_sdpa(forced_onednn, torch_threads, monkeypatch, tokens, block):
    monkeypatch.setattr(onednn, "MAX_BLOCK_QUERIES", block)
    torch_threads(3)
    q, k, v = torch.randn(2, tokens, 3, 3, 16).permute(2, 0, 3, 1, 4)  # 3 x (B, h, N, d), as in Attention
    with torch.inference_mode():
        values, _ = onednn.attention(q, k, v, dropout_prob=0.0, training=False)
        torch.testing.assert_close(values, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=0)
    assert forced_onednn


@needs_onednn
def test_onednn_linear_takes_any_strides(forced_onednn):
    linear = nn.Sequential(nn.Linear(24, 40)).eval()
    onednn.replace_linears(linear)
    x = torch.randn(3, 7, 24)
    with torch.inference_mode():
        for rows in (x, x[:, :1], x[:, ::2], x.transpose(0, 1), x[0]):
            expected = F.linear(rows, linear[0].weight, linear[0].bias)
            torch.testing.assert_close(linear(rows), expected, atol=1e-5, rtol=0)
    assert len(forced_onednn) == 5


@needs_onednn
def test_onednn_only_for_float32_and_many_queries(forced_onednn):
    linear = nn.Sequential(nn.Linear(16, 16)).eval()
    onednn.replace_linears(linear)
    q, k, v = torch.randn(3, 1, 2, 600, 16)
    with torch.inference_mode():
        onednn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), dropout_prob=0.0, training=False)
        onednn.attention(q[:, :, :1], k, v, dropout_prob=0.0, training=False)
        linear.bfloat16()(q.bfloat16())
    assert not forced_onednn


# The paper's other models


MODELS = {
    "factorised encoder": {"attention_type": "factorised_encoder", "num_temporal_layers": 3},
    "factorised self-attention": {"attention_type": "factorised_self_attention"},
    "factorised dot-product": {"attention_type": "factorised_dot_product"},
}
each_model = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)


@each_model
@pytest.mark.parametrize("by_onednn", [False, pytest.param(True, marks=needs_onednn)])
def test_prepared_logits_of_other_models(forced_onednn, chunks, torch_threads, monkeypatch, by_onednn, changes):
    use_onednn(monkeypatch, *[torch.float32] * by_onednn)
    torch_threads(2)
    model = make_model(num_attention_heads=4, **changes)
    ours, x = prepared(model), random_clips()
    with torch.inference_mode():
        torch.testing.assert_close(ours(x).logits, model(x).logits, atol=1e-4, rtol=1e-5)
    assert bool(forced_onednn) == by_onednn
    assert sum(chunks) >= 2 * 512 and max(chunks) <= 512


@each_model
def test_int8_logits_of_other_models_independent_of_batch(torch_threads, changes):
    exact = make_model(num_attention_heads=4, **changes)
    rounded, x = prepared(exact, int8=True), random_clips(3)
    assert not any(type(module) is nn.Linear for module in rounded.vivit.modules())
    with torch.inference_mode():
        expected = exact(x).logits
        torch_threads(2)
        together = rounded(x).logits
        alone = torch.cat([rounded(clip[None]).logits for clip in x])
    assert 0 < (together - expected).std() < 0.05 * expected.std()
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@each_model
def test_other_models_compile_without_graph_breaks(changes):
    model, x = make_model(num_attention_heads=4, num_hidden_layers=1, **changes), random_clips(1)
    with torch.inference_mode():
        compiled = torch.compile(lambda x: model(x).logits, backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(x), model(x).logits)


@each_model
def test_warm_up_runs_two_layers_of_each_encoder_at_every_size(monkeypatch, changes):
    use_onednn(monkeypatch, torch.float32)
    monkeypatch.setattr(kernels, "is_onednn_faster", onednn.is_faster)
    model = make_model(num_attention_heads=4, num_hidden_layers=3, image_size=16, **changes)
    processor = VivitImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    options = HandlerOptions(dtype="float32", micro_batch_clips=4)
    classifier = VideoClassifier(model, processor, options=options)
    encoders = [encoder for encoder in (model.vivit, model.vivit.temporal) if encoder is not None]
    batches = []
    for layer in (layer for encoder in encoders for layer in encoder.layers):
        layer.mlp.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    classifier.warm_up()
    assert Counter(batches) == {1: 3 * len(encoders), **dict.fromkeys((2, 3, 4), 2 * len(encoders))}
    clips = list(torch.randint(0, 256, (5, 1, 8, 3, 16, 16), dtype=torch.uint8).numpy())
    together = classifier.logits(clips)
    assert Counter(batches) == {1: 6 * len(encoders), **dict.fromkeys((2, 3), 2 * len(encoders)), 4: 5 * len(encoders)}
    torch.testing.assert_close(together[:1], classifier.logits(clips[:1]), atol=1e-5, rtol=1e-5)


# Half precision


@pytest.mark.parametrize("activation", ["gelu_fast", "gelu", "silu"])
@pytest.mark.parametrize(
    "dtype, by_onednn",
    [(torch.bfloat16, False), (torch.float16, False), pytest.param(torch.bfloat16, True, marks=needs_bfloat16)],
)
def test_half_precision_as_exact_as_plain_torch(monkeypatch, torch_threads, dtype, by_onednn, activation):
    use_onednn(monkeypatch, *[dtype] * by_onednn)
    torch_threads(2)
    plain = make_model(hidden_act=activation).to(dtype)
    ours, oracle = prepared(plain), copy.deepcopy(plain).double()
    clips, tokens = random_clips().to(dtype), torch.randn(2, 513, 24).to(dtype)
    with torch.inference_mode():
        logits = oracle(clips.double()).logits
        # About ten operations in a row round once each, and independent errors add up as squares.
        assert (ours(clips).logits - logits).abs().max() <= 10**0.5 * torch.finfo(dtype).eps * logits.abs().max()
        hidden, _ = oracle.vivit.layers[0](tokens.double())
        errors = [(model.vivit.layers[0](tokens)[0] - hidden).abs().mean() for model in (plain, ours)]
        assert 0 < errors[1] <= 1.01 * errors[0]


@needs_bfloat16
@pytest.mark.parametrize("activation, algorithm", [("gelu_fast", "tanh"), ("gelu", "none")])
def test_gelu_computed_before_rounding(monkeypatch, activation, algorithm):
    use_onednn(monkeypatch, torch.bfloat16)
    mlp = prepared(make_model(hidden_act=activation).bfloat16()).vivit.layers[0].mlp
    x = torch.randn(600, 24).bfloat16()
    sums = x.double() @ mlp.up.weight.detach().double().T + mlp.up.bias.detach().double()
    exact = F.gelu(sums, approximate=algorithm)
    with torch.inference_mode():
        hidden = mlp.up.multiply(x, gelu=algorithm)
        output = mlp(x)
        # One rounding: at most half a unit in the last place, plus the error of oneDNN's polynomial.
        torch.testing.assert_close(hidden.double(), exact, rtol=2**-8, atol=1e-5)
        assert torch.equal(output, mlp.down(hidden))


@needs_bfloat16
def test_packed_weights_follow_changes(monkeypatch):
    use_onednn(monkeypatch, torch.bfloat16)
    model = prepared(make_model().bfloat16())
    layer, x = model.vivit.layers[0].attention.qkv, torch.randn(5, 24).bfloat16()
    with torch.inference_mode():
        before = layer(x)
        assert layer._packed is not None
    state = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        with torch.inference_mode():
            assert torch.equal(layer(x), 2 * before)
        model.load_state_dict({name: tensor / 2 for name, tensor in state.items()})
        with torch.inference_mode():
            assert torch.equal(layer(x), before)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
@pytest.mark.parametrize("operator", ["_linear_pointwise", "_reorder_linear_weight"])
def test_torch_without_private_operators_still_computes(monkeypatch, error, operator):
    def fail(*arguments):
        raise error("removed")

    monkeypatch.setattr(torch.ops.mkldnn, operator, fail, raising=False)
    monkeypatch.setattr(cpuinfo, "CPUINFO_WORDS", frozenset({"amx_bf16", "avx512_fp16", "AuthenticAMD", "avx512f"}))
    onednn.is_faster.cache_clear()
    try:
        for dtype in (torch.bfloat16, torch.float16):
            assert not onednn.is_faster(dtype)
            plain = make_model().to(dtype)
            with torch.inference_mode():
                clips = random_clips(1).to(dtype)
                torch.testing.assert_close(prepared(plain)(clips).logits, plain(clips).logits, rtol=0.05, atol=0.05)
    finally:
        onednn.is_faster.cache_clear()


def test_onednn_only_on_processors_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(onednn, "works", lambda dtype: True)
    for words, expected in (
        (set(), set()),
        ({"avx512f", "avx512_vnni"}, set()),
        ({"amx_tile", "amx_bf16"}, {torch.bfloat16}),
        ({"avx512_bf16", "avx512_fp16"}, {torch.bfloat16, torch.float16}),
    ):
        monkeypatch.setattr(cpuinfo, "CPUINFO_WORDS", frozenset(words))
        onednn.is_faster.cache_clear()
        assert {dtype for dtype in (torch.bfloat16, torch.float16) if onednn.is_faster(dtype)} == expected
    onednn.is_faster.cache_clear()


# Kernels act in inference only


@pytest.fixture(
    params=[None, pytest.param(torch.float32, marks=needs_onednn), pytest.param(torch.bfloat16, marks=needs_bfloat16)],
    ids=["chunked", "onednn", "bfloat16"],
)
def model_pair(request, monkeypatch):
    """The same model with dropout, unprepared and prepared. The default dtype is the model's."""
    use_onednn(monkeypatch, request.param)
    dtype = request.param or torch.float32
    plain = make_model(hidden_dropout_prob=0.5, num_hidden_layers=1).to(dtype)
    torch.set_default_dtype(dtype)
    yield plain, prepared(plain)
    torch.set_default_dtype(torch.float32)


def test_training_without_gradients_is_reproducible(model_pair, torch_threads):
    torch_threads(2)
    plain, ours = (model.train() for model in model_pair)
    x, logits = random_clips(), []
    with torch.no_grad():
        for model in (plain, ours, ours, ours):
            torch.manual_seed(3)
            logits.append(model(x).logits)
    assert all(torch.equal(row, logits[0]) for row in logits)


def test_reentrant_checkpointing_keeps_gradients(model_pair, torch_threads):
    torch_threads(2)
    plain, ours = (model.train().vivit.layers[0] for model in model_pair)
    gradients = []
    for run in (
        lambda x: plain(x)[0],
        lambda x: checkpoint_activations(lambda x: ours(x)[0], x, use_reentrant=True),
    ):
        x = torch.linspace(-1, 1, 2 * 513 * 24).view(2, 513, 24).requires_grad_()
        torch.manual_seed(3)
        run(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_gradients_flow_in_eval_mode(model_pair):
    for model in model_pair:
        model(random_clips(), labels=torch.tensor([1, 2])).loss.backward()
    plain, ours = (dict(model.named_parameters()) for model in model_pair)
    assert plain.keys() == ours.keys()
    for name, parameter in plain.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad)


def test_autocast_applies_to_linear_layers(model_pair):
    _, ours = model_pair
    layer, x = ours.vivit.layers[0], torch.randn(1, 513, 24)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.mlp(x).dtype == layer.attention.qkv(x).dtype == torch.bfloat16


def test_hooks_called_once_with_all_tokens(model_pair, torch_threads):
    torch_threads(2)
    _, ours = model_pair
    mlp, shapes = ours.vivit.layers[0].mlp, []

    def record(module, inputs, output):
        shapes.append(tuple(inputs[0].shape))

    x = torch.randn(2, 513, 24)
    with torch.inference_mode():
        for module in (mlp, mlp.up, mlp.down):
            handle = module.register_forward_hook(record)
            mlp(x)
            handle.remove()
        handle = nn.modules.module.register_module_forward_hook(record)
        mlp(x)
        handle.remove()
    assert shapes == [(2, 513, 24), (2, 513, 24), (2, 513, 40), (2, 513, 24), (2, 513, 40), (2, 513, 24)]


def test_tracing_and_compiling_see_all_operations(model_pair):
    plain, ours = model_pair
    mlp, x = ours.vivit.layers[0].mlp, torch.randn(1, 513, 24)
    with torch.no_grad():
        expected = plain.vivit.layers[0].mlp(2 * x)
        traced = torch.jit.trace(mlp, x)
        torch.testing.assert_close(traced(2 * x), expected, atol=1e-5, rtol=0)
        compiled = torch.compile(mlp, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(2 * x), expected, atol=1e-5, rtol=0)


def test_prepared_model_can_be_copied_pickled_and_saved(model_pair, tmp_path):
    plain, ours = model_pair
    ours.save_pretrained(tmp_path)
    loaded = VivitForVideoClassification.from_pretrained(tmp_path, torch_dtype="auto")
    x = random_clips(1)
    with torch.inference_mode():
        expected = ours(x).logits
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(x).logits, expected)
        assert torch.equal(loaded(x).logits, plain(x).logits)
    plain.load_state_dict(ours.state_dict())


# int8


def test_int8_close_to_float32_in_all_layers():
    exact = make_model()
    rounded = prepared(exact, int8=True)
    x = random_clips()
    with torch.inference_mode():
        expected = exact(x).logits
        difference = rounded(x).logits - expected
    assert not [module for module in rounded.vivit.layers.modules() if isinstance(module, nn.Linear)]
    assert 0 < difference.std() < 0.05 * expected.std()


@pytest.mark.parametrize("spread", [1, 100])
def test_int8_logits_independent_of_batch_chunks_and_threads(torch_threads, spread):
    """Equal up to float32 rounding of the layers that stay in float32, although the clips' ranges differ."""
    model = prepared(make_model(), int8=True)
    x = random_clips(3) * torch.tensor([1.0, spread, 1 / spread]).view(3, 1, 1, 1, 1)
    with torch.inference_mode():
        torch_threads(3)
        together = model(x).logits
        for threads in (1, 2):
            torch_threads(threads)
            alone = torch.cat([model(clip[None]).logits for clip in x])
            torch.testing.assert_close(alone, together, atol=1e-6, rtol=1e-6)
        model.vivit.layers[0].mlp.up.register_forward_hook(lambda *_: None)  # turns chunks off
        torch.testing.assert_close(model(x).logits, together, atol=1e-6, rtol=1e-6)


def test_int8_linear_with_zero_weights_returns_bias():
    linear = nn.Linear(16, 4)
    linear.weight.data[2] = 0
    module = nn.Sequential(nn.Sequential(linear))
    quantize_linears(module)
    assert isinstance(module[0][0], Int8Linear)
    torch.testing.assert_close(module(torch.randn(5, 16))[:, 2], linear.bias[2].expand(5).detach())


def test_int8_model_can_be_copied_and_pickled():
    model = prepared(make_model(), int8=True)
    x = random_clips(1)
    with torch.inference_mode():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x).logits, model(x).logits)


# Threads


@pytest.mark.parametrize("count", [4, 5, 6])
def test_concurrent_first_calls_keep_torch_threads(torch_threads, count):
    torch_threads(count)
    model = make_model()
    x, ready = random_clips(1), threading.Barrier(6)
    with torch.inference_mode():
        expected = model(x).logits
    for module in model.vivit.layers:
        module.mlp.__class__ = chunked.ChunkedMLP  # without starting the threads here

    def call(_):
        ready.wait()
        start_threads()
        with torch.inference_mode():
            return model(x).logits, torch.get_num_threads()

    with ThreadPoolExecutor(6) as callers:
        results = list(callers.map(call, range(6)))
    assert [threads for _, threads in results] == [count] * 6
    assert torch.get_num_threads() == count
    with ThreadPoolExecutor(1) as another:
        assert another.submit(torch.get_num_threads).result() == count
    for logits, _ in results:
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_one_torch_thread_per_task(torch_threads):
    torch_threads(3)
    ones, counts = torch.ones(100, 100), []
    with torch.inference_mode():
        parallel.run_parallel(lambda _: counts.append((ones @ ones, torch.get_num_threads())[1]), zip(range(9)))
    assert counts == [1] * 9
    assert torch.get_num_threads() == 3


def test_failing_task_raises(torch_threads):
    torch_threads(2)
    done = []

    def fail_on_three(number):
        if number == 3:
            raise ZeroDivisionError
        done.append(number)

    with torch.inference_mode(), pytest.raises(ZeroDivisionError):
        parallel.run_parallel(fail_on_three, zip(range(1000)))
    assert len(done) < 999
