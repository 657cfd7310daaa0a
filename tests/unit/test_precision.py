"""The choice between float32 and half precision on a CPU, for faked processors and times."""

import dataclasses
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from handler import VideoClassifier, VivitConfig, VivitForVideoClassification
from handler.kernels import choose_dtype, cpuinfo, has_float16_range, onednn, precision
from handler.options import HandlerOptions

AMX = {"amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", "avx512_fp16"}
TOKENS = 33


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = VivitConfig(
        image_size=16,
        num_frames=4,
        tubelet_size=(2, 4, 4),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    return VivitForVideoClassification(config).eval()


@pytest.fixture(autouse=True)
def cache_file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / precision.CACHE_FILE


@pytest.fixture
def processor(monkeypatch):
    """processor(features, float32=s, ...) fakes a processor and times; returns a list with one item per measurement."""

    def fake(features, **times_s):
        measured = []

        def measure(layer, *, dtypes, tokens):
            measured.append(tokens)
            return {dtype: times_s[str(dtype).removeprefix("torch.")] for dtype in dtypes}

        monkeypatch.setattr(cpuinfo, "CPUINFO_WORDS", frozenset(features))
        monkeypatch.setattr(precision, "measure_layer_s", measure)
        onednn.is_faster.cache_clear()
        return measured

    yield fake
    onednn.is_faster.cache_clear()


def choose(model, *, fits=True):
    return choose_dtype(model.vivit.layers[0], tokens=TOKENS, has_float16_range=lambda: fits)


@pytest.mark.parametrize(
    "features, times_s, fits, expected, reason",
    [
        (
            AMX,
            {"float32": 1.0, "bfloat16": 0.28, "float16": 0.30},
            True,
            "float16",
            "takes 0.30 of its time in float32",
        ),
        (AMX, {"float32": 1.0, "bfloat16": 0.28, "float16": 0.40}, True, "bfloat16", "0.28 .*amx_bf16, avx512_bf16"),
        (AMX, {"float32": 1.0, "bfloat16": 0.28, "float16": 0.25}, False, "bfloat16", "0.28 .*range of float16"),
        (AMX, {"float32": 1.0, "bfloat16": 0.80, "float16": 0.50}, False, "float32", "not 1.3x .*range of float16"),
        (AMX, {"float32": 1.0, "bfloat16": 0.80, "float16": 0.90}, True, "float32", "not 1.3x as fast on this CPU$"),
        ({"avx512_bf16"}, {"float32": 1.0, "bfloat16": 0.6}, True, "bfloat16", "0.60 .*avx512_bf16"),
        ({"avx512_fp16"}, {"float32": 1.0, "float16": 0.6}, False, "float32", "range of float16"),
        ({"avx512f", "avx512_vnni"}, {}, True, "float32", "no units for half precision"),
    ],
)
def test_fastest_dtype_with_finest_rounding(processor, model, features, times_s, fits, expected, reason):
    processor(features, **times_s)
    choice = choose(model, fits=fits)
    assert choice.dtype is getattr(torch, expected)
    assert re.search(f"^auto: .*{reason}", choice.reason)


def test_nothing_measured_without_units_for_half_precision(processor, model, cache_file):
    measured = processor({"avx512f"})
    choose(model)
    assert not measured and not cache_file.parent.exists()


def test_measured_once_per_machine_and_model(processor, model, monkeypatch, cache_file):
    measured = processor({"amx_bf16"}, float32=1.0, bfloat16=0.3)
    assert choose(model) == choose(model)
    assert len(measured) == 1
    monkeypatch.setattr(precision, "CPU_NAME", "another processor")
    choose(model)
    choose_dtype(model.vivit.layers[0], tokens=2 * TOKENS, has_float16_range=lambda: True)
    assert len(measured) == 3
    choose(model)
    assert len(measured) == 3
    assert len(json.loads(cache_file.read_text())) == 3
    assert [file.name for file in cache_file.parent.iterdir()] == [cache_file.name]


def test_workers_that_start_together_agree(processor, model, monkeypatch):
    processor({"amx_bf16"}, float32=1.0, bfloat16=0.3)
    measure, found = precision.measure_layer_s, []

    def measure_while_another_worker_finishes(layer, **what):
        monkeypatch.setattr(precision, "measure_layer_s", measure)
        found.append(choose(model))
        return dict.fromkeys(what["dtypes"], 1.0)

    monkeypatch.setattr(precision, "measure_layer_s", measure_while_another_worker_finishes)
    found.append(choose(model))
    assert found[0] == found[1] and found[0].dtype is torch.bfloat16


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda content: b"\xff\x00",
        lambda content: b"[" * 10**5,
        lambda content: b"[]",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"0.3", b"-0.3"),
        lambda content: content.replace(b"0.3", b"NaN"),
        lambda content: content.replace(b"0.3", b'"0.3"'),
        lambda content: content.replace(b"bfloat16", b"bfloat"),
    ],
)
def test_corrupt_cache_replaced(processor, model, cache_file, corrupt):
    measured = processor({"amx_bf16"}, float32=1.0, bfloat16=0.3)
    expected = choose(model)
    intact = cache_file.read_bytes()
    cache_file.write_bytes(corrupt(intact))
    assert choose(model) == expected
    assert len(measured) == 2 and cache_file.read_bytes() == intact


@pytest.mark.parametrize("folder", ["file", "file/below", "relative", ""])
def test_unwritable_cache_ignored(processor, model, monkeypatch, tmp_path, folder):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder) if folder.startswith("file") else folder)
    measured = processor({"amx_bf16"}, float32=1.0, bfloat16=0.3)
    assert choose(model).dtype is choose(model).dtype is torch.bfloat16
    assert len(measured) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_cache_intact_after_concurrent_writers(processor, model, cache_file):
    processor({"amx_bf16"}, float32=1.0, bfloat16=0.3)

    def choose_for(tokens):
        choice = choose_dtype(model.vivit.layers[0], tokens=tokens, has_float16_range=lambda: True)
        json.loads(cache_file.read_text())
        return choice.dtype

    with ThreadPoolExecutor(8) as workers:
        assert set(workers.map(choose_for, range(100))) == {torch.bfloat16}
    assert 1 <= len(json.loads(cache_file.read_text())) <= precision.MAX_CACHED_MACHINES


def test_measured_times_positive(model):
    layer = model.vivit.layers[0]
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    times_s = precision.measure_layer_s(layer, dtypes=dtypes, tokens=TOKENS)
    assert list(times_s) == list(dtypes) and all(0 < time_s < math.inf for time_s in times_s.values())
    assert all(torch.equal(state[name], tensor) for name, tensor in layer.state_dict().items())
    assert type(layer.mlp).__name__ == "MLP"


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("vivit.layernorm.weight", 1.0, True),
        ("vivit.layers.1.mlp.up.bias", 8000.0, True),
        ("vivit.layers.1.mlp.up.bias", 9000.0, False),  # an eighth of float16's largest number is 8188
        ("vivit.embedding.cls_token", 9000.0, False),
        ("classifier.bias", 1e5, False),
        ("vivit.layernorm.bias", math.nan, False),
    ],
)
def test_float16_range_of_weights_and_activations(model, name, value, expected):
    model.state_dict()[name].fill_(value)
    clip = torch.randn(1, 2, 3, 16, 16)  # half as many frames as the model takes
    assert has_float16_range(model, clip) == expected
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "name, expected", [("auto", "bfloat16"), ("float32", "float32"), ("float16", "float16"), ("int8", "int8")]
)
def test_classifier_obeys_explicit_dtype(processor, checkpoint, name, expected):
    measured = processor({"amx_bf16"}, float32=1.0, bfloat16=0.3)
    classifier = VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(dtype=name))
    assert classifier.dtype is getattr(torch, expected)
    assert len(measured) == (name == "auto")
    assert classifier.dtype_reason == (
        "auto: a layer takes 0.30 of its time in float32 (amx_bf16)" if measured else f"the option dtype is {name}"
    )
    classifier.warm_up()


@pytest.mark.parametrize("largest, expected", [(1.0, "float16"), (1e5, "bfloat16")])
def test_classifier_avoids_float16_overflow(processor, checkpoint, largest, expected):
    processor(AMX, float32=1.0, bfloat16=0.3, float16=0.3)
    model = VivitForVideoClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        model.classifier.bias[0] = largest
    image_processor = VideoClassifier.from_pretrained(checkpoint).image_processor
    classifier = VideoClassifier(model, image_processor)
    assert classifier.dtype is getattr(torch, expected)
    classifier.warm_up()


@pytest.mark.parametrize(
    "attention_type", ["factorised_encoder", "factorised_self_attention", "factorised_dot_product"]
)
def test_layers_of_other_models_measured(model, attention_type):
    config = dataclasses.replace(model.config, attention_type=attention_type, classifier_pooling=None)
    other = VivitForVideoClassification(config).eval()
    outputs = []
    for name, module in other.vivit.layers[0].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output, name=name: outputs.append(name))
    times_s = precision.measure_layer_s(other.vivit.layers[0], dtypes=[torch.float32], tokens=config.sequence_length)
    assert 0 < times_s[torch.float32] < math.inf
    assert {name.split(".")[0] for name in outputs} == {
        "mlp",
        *(["attention_time", "attention_space"] if "self" in attention_type else ["attention"]),
    }
