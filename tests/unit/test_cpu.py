"""What a CPU computes in other ways: against torch's own functions."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from handler.kernels import cpu

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch):
    """Chosen whatever the processor is; returns how often it was asked."""
    calls = []
    multiply = cpu.multiply
    monkeypatch.setattr(cpu, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(cpu, "multiply", lambda *tensors: calls.append(1) or multiply(*tensors))
    return calls


@pytest.fixture
def torch_threads():
    """torch_threads(count) until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def heads(tokens, *, width=16):
    """Queries, keys and values of two clips and three heads, as one product makes them: (2, 3, tokens, width) each."""
    qkv = torch.randn(2, tokens, 3, 3, width, generator=torch.Generator().manual_seed(1))
    return qkv.permute(2, 0, 3, 1, 4)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("without_gradients", [torch.inference_mode, torch.no_grad])
def test_a_linear_layer_by_onednn_is_that_of_torch(onednn, bias, without_gradients):
    linear = cpu.Linear(24, 40, bias=bias)
    rows = torch.randn(3, 7, 24)
    with without_gradients():
        for x in (rows, rows[:, :1], rows[:, ::2], rows.transpose(0, 1), rows[0]):
            torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias), atol=1e-5, rtol=0)
    assert len(onednn) == 5


@needs_onednn
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("without_gradients", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("tokens, rows", [(600, 256), (512, 128), (515, 1000)])
def test_attention_by_onednn_is_that_of_torch_whatever_the_blocks_leave(
    onednn, torch_threads, tokens, rows, without_gradients, threads, monkeypatch
):
    monkeypatch.setattr(cpu, "ROWS", rows)
    torch_threads(threads)
    q, k, v = heads(tokens)
    with without_gradients():
        attended = cpu.attention(q, k, v)
        expected = F.scaled_dot_product_attention(q, k, v)
    assert onednn
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(2, 700, 24), (1500, 24), (1, 513, 24)])
def test_by_rows_gives_what_all_rows_at_once_give(torch_threads, shape, threads):
    torch_threads(threads)
    layer = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 24)).eval()
    counts = []
    x = torch.randn(shape)
    for rows in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        with torch.inference_mode():
            made = cpu.by_rows(lambda some: counts.append(len(some)) or layer(some), rows)
            torch.testing.assert_close(made, layer(rows), atol=1e-6, rtol=0)
    assert max(counts) <= 2 * cpu.ROWS and len(counts) % threads == 0


def test_by_rows_keeps_gradients(torch_threads):
    torch_threads(3)
    x = torch.randn(600, 24, requires_grad=True)
    cpu.by_rows(torch.tanh, x).sum().backward()
    torch.testing.assert_close(x.grad, 1 - x.detach().tanh() ** 2)


@needs_onednn
def test_attention_leaves_torch_its_threads_in_this_thread_and_in_new_ones(onednn, torch_threads):
    torch_threads(3)
    with torch.inference_mode():
        cpu.attention(*heads(cpu.MIN_TOKENS))
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3


def test_each_of_the_threads_computes_with_itself_alone(torch_threads):
    torch_threads(3)
    ones = torch.ones(100, 100)
    counts = cpu._threads(3).map(lambda _: (ones @ ones, torch.get_num_threads())[1], range(9))
    assert list(counts) == [1] * 9


@needs_onednn
def test_attention_that_fails_in_a_thread_says_so(onednn, torch_threads, monkeypatch):
    torch_threads(2)
    monkeypatch.setattr(cpu, "multiply", lambda *tensors: 1 / 0)
    with torch.inference_mode(), pytest.raises(ZeroDivisionError):
        cpu.attention(*heads(cpu.MIN_TOKENS))


def test_what_needs_gradients_dropout_or_half_precision_is_left_to_torch(onednn):
    linear = cpu.Linear(24, 40)
    linear(torch.randn(2, 24)).sum().backward()
    assert linear.weight.grad is not None
    q, k, v = heads(cpu.MIN_TOKENS)
    cpu.attention(q.requires_grad_(), k, v)
    with torch.inference_mode():
        cpu.attention(q, k, v, dropout_prob=0.5)
        cpu.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
        cpu.attention(q[:, :, :1], k, v)
        linear.bfloat16()(torch.randn(2, 24).bfloat16())
    assert not onednn


def test_eight_bits_stay_near_and_all_layers_have_them():
    torch.manual_seed(0)
    exact = nn.Sequential(cpu.Linear(64, 96), nn.Sequential(nn.GELU(), nn.Linear(96, 32, bias=False)))
    rounded = nn.Sequential(cpu.Linear(64, 96), nn.Sequential(nn.GELU(), nn.Linear(96, 32, bias=False)))
    rounded.load_state_dict(exact.state_dict())
    cpu.quantize_linears(rounded)
    x = torch.randn(2, 50, 64)
    with torch.inference_mode():
        expected = exact(x)
        errors = rounded(x) - expected
    assert not [layer for layer in rounded.modules() if isinstance(layer, nn.Linear)]
    assert 0 < errors.std() < 0.05 * expected.std()


def test_an_output_whose_weights_are_all_zeros_stays_its_bias():
    linear = nn.Linear(16, 4)
    linear.weight.data[2] = 0
    outputs = cpu.Int8Linear(linear)(torch.randn(5, 16))
    torch.testing.assert_close(outputs[:, 2], linear.bias[2].expand(5).detach())
