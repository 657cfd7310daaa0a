"""The handler's hooks, called like TorchServe's worker does, without a server."""

import base64
import dataclasses
import gc
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import psutil
import pytest
import torch
import yaml
from ts.context import Context, RequestProcessor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.service import Service

from handler import __version__, vivit_handler
from handler.assets import METRICS, MODEL_CONFIG
from handler.checkpoints.hub import CheckpointError
from handler.inference import DeviceError
from handler.models.cost import count_multiply_adds
from handler.options import HandlerOptions
from handler.vivit_handler import VivitHandler, assigned_device
from tests.support.clips import audio_only, numbered_frames, write_clip

ROOT = Path(__file__).resolve().parents[2]


def make_context(model_dir, *, settings=None, gpu_id=None):
    """A worker's context, with the metrics in metrics.yaml."""
    metrics = MetricsCacheYamlImpl(config_file_path=str(METRICS))
    metrics.initialize_cache()
    metrics.model_name = "vivit"
    return Context("vivit", str(model_dir), {}, 8, gpu_id, "0.12", metrics=metrics, model_yaml_config=settings)


@pytest.fixture(scope="module")
def handler(checkpoint):
    with open(MODEL_CONFIG) as file:
        settings = yaml.safe_load(file)
    handler = VivitHandler()
    handler.initialize(make_context(checkpoint, settings=settings))
    yield handler
    handler.decoders.close()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Bytes of three videos."""
    folder = tmp_path_factory.mktemp("clips")
    return [
        write_clip(folder / "a.mp4", numbered_frames(30, seed=1)).read_bytes(),
        write_clip(folder / "b.webm", numbered_frames(21, height=90, width=64, seed=2), codec="libvpx").read_bytes(),
        write_clip(folder / "c.mkv", numbered_frames(12, height=48, width=48, seed=3)).read_bytes(),
    ]


def handle(handler, rows, *, headers=None):
    """(bodies, statuses) of one batch."""
    context = handler.context
    context.request_ids = {index: f"id-{index}" for index in range(len(rows))}
    context.metrics.request_ids = context.request_ids
    context.request_processor = [RequestProcessor(dict(each)) for each in headers or [{}] * len(rows)]
    bodies = handler.handle([dict(row) for row in rows], context)
    assert len(bodies) == len(rows)
    json.dumps(bodies)
    return bodies, [context.get_response_status(index)[0] for index in range(len(rows))]


def test_mixed_batch_independent_answers(handler, videos, tmp_path):
    sound = audio_only(tmp_path / "a.m4a").read_bytes()
    bad = [b"", b"hello", b'{"video": 3}', b"ffconcat version 1.0\nfile a.mp4\n", videos[0][:200], sound]
    rows = [{"body": videos[0]}, *({"body": data} for data in bad), {"body": videos[1]}, {"body": videos[2]}]
    answers, statuses = handle(handler, rows)
    assert statuses == [200, 400, 415, 400, 415, 422, 422, 200, 200]
    assert [answer["error"]["code"] for answer in answers if "error" in answer] == [
        "empty_body",
        "not_a_video",
        "bad_base64",
        "unsupported_container",
        "corrupt_video",
        "no_video_stream",
    ]
    for index, data in ((0, videos[0]), (7, videos[1]), (8, videos[2])):
        (alone,), _ = handle(handler, [{"body": bytearray(data)}])
        together = answers[index]
        assert [each["label"] for each in together["predictions"]] == [each["label"] for each in alone["predictions"]]
        assert together["predictions"][0]["score"] == pytest.approx(alone["predictions"][0]["score"], abs=1e-5)
        assert (together["video"], together["warnings"]) == (alone["video"], [])
    video = answers[0]["video"]
    assert (video["frame_count"], video["width"], video["height"], video["codec"]) == (30, 176, 144, "h264")
    assert len(video["frame_times_s"]) == 8 and video["frames"] == video["frame_times_s"]


def test_top_k_per_request(handler, videos):
    rows = [{"body": videos[0]}, {"data": videos[0], "top_k": b"1"}, {"body": videos[0]}]
    answers, _ = handle(handler, rows, headers=[{}, {}, {"X-Top-K": "9"}])
    assert [len(answer["predictions"]) for answer in answers] == [5, 1, 9]


def test_views_per_request(handler, videos):
    dense = {"views": b"4x3", "sampling": b"dense", "stride_frames": b"2"}
    bad = {"views": b"7x7"}
    rows = [
        {"data": videos[0]},
        {"data": videos[0], **dense},
        {"data": videos[1], **bad},
        {"data": videos[2], "start_s": b"0.2", "end_s": b"0.4"},
        {"data": videos[2], "start_s": b"100"},
    ]
    answers, statuses = handle(handler, rows)
    assert statuses == [200, 200, 400, 200, 422]
    assert [answers[index]["error"]["code"] for index in (2, 4)] == ["too_many_views", "empty_part"]
    assert answers[0].keys() == answers[3].keys() == {"predictions", "video", "warnings"}
    assert answers[3]["video"]["frame_times_s"] == [0.2, 0.2, 0.24, 0.28, 0.28, 0.32, 0.36, 0.36]
    expected = handler.classifier.classify(videos[0], views="4x3", sampling="dense", stride_frames=2)
    assert answers[1]["predictions"][0]["score"] == pytest.approx(expected.predictions[0][1], abs=1e-5)
    assert answers[1]["agreement"] == expected.agreement
    for found, view in zip(answers[1]["views"], expected.views, strict=True):
        assert (found["label"], found["score"]) == (view.predictions[0][0], pytest.approx(view.predictions[0][1]))
        assert found["crop"] == {"top": 4, "left": view.crop.left, "height": 32, "width": 32}
        assert found["frame_times_s"] == pytest.approx(view.times_s, abs=1e-3)


def test_embeddings_and_predictions_in_one_batch(handler, videos, checkpoint):
    modes = [
        {},
        {"mode": b"embedding"},
        {"mode": b"embedding", "pooling": b"mean", "normalize": b"true", "encoding": b"base64", "views": b"2x1"},
        {"mode": b"embedding", "normalize": True},
        {"mode": b"embedding", "pooling": b"max"},
        {"pooling": b"cls"},
    ]
    answers, statuses = handle(handler, [{"data": videos[0], **mode} for mode in modes])
    assert statuses == [200, 200, 200, 200, 400, 400]
    assert answers[0]["predictions"][0]["label"] == handler.classifier.classify(videos[0]).predictions[0][0]
    expected = handler.classifier.embed(videos[0])
    np.testing.assert_allclose(answers[1]["embedding"], expected.vector, rtol=1e-5, atol=1e-5)
    assert (answers[1]["dimensions"], answers[1]["pooling"], answers[1]["normalized"]) == (32, "cls", False)
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert answers[1]["weights_sha256"] == expected.weights_sha256 == hashlib.sha256(weights).hexdigest()
    mean = handler.classifier.embed(videos[0], pooling="mean", normalize=True, views="2x1")
    decoded = np.frombuffer(base64.b64decode(answers[2]["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, mean.vector, rtol=1e-5, atol=1e-5)
    assert np.linalg.norm(answers[3]["embedding"]) == pytest.approx(1, abs=1e-5)
    assert [answers[index]["error"]["code"] for index in (4, 5)] == ["bad_parameter"] * 2


def test_describe_and_explain_headers_affect_one_request(handler, videos):
    rows = [{"body": videos[0]}, {"body": videos[0]}, {}, {"body": videos[0]}]
    headers = [{"describe": "True"}, {"explain": "True"}, {"describe": "True"}, {"explain": "False"}]
    answers, statuses = handle(handler, rows, headers=headers)
    assert statuses == [200, 200, 200, 200]
    assert ["explanation" in answer for answer in answers] == [False, True, False, False]
    assert "predictions" in answers[0] and "predictions" in answers[3]
    assert answers[2] == handler.describe_handle()
    assert "explanation" in handle(handler, rows[1:], headers=headers[1:])[0][0]


def test_explanations_of_a_batch(handler, videos):
    explain = {"explain": "True"}
    headers = [explain, {}, {**explain, "X-Label": "LABEL_4"}, {**explain, "x-label": "cat"}, explain, explain]
    rows = [{"body": video} for video in (videos[0], videos[0], videos[1], videos[0], b"hello")]
    rows.append({"video": videos[2], "top_k": b"1", "label": b"LABEL_0"})
    answers, statuses = handle(handler, rows, headers=headers)
    assert statuses == [200, 200, 200, 400, 415, 200]
    assert answers[3]["error"]["code"] == "bad_parameter" and "LABEL_0" in answers[3]["error"]["message"]
    best = answers[1]["predictions"][0]
    for first, second in zip(answers[0]["predictions"], answers[1]["predictions"]):
        assert first == {"label": second["label"], "score": pytest.approx(second["score"], abs=1e-5)}
    assert answers[0]["explanation"]["label"] == best["label"]
    assert answers[2]["explanation"]["label"] == "LABEL_4" and len(answers[5]["predictions"]) == 1
    assert np.shape(answers[5]["explanation"]["heat"]) == (4, 4, 4)
    expected = handler.classifier.explain(videos[1], label="LABEL_4").heat
    np.testing.assert_allclose(answers[2]["explanation"]["heat"], expected / expected.max(), atol=1e-3)


def test_label_rejected_in_predictions(handler, videos):
    answers, statuses = handle(handler, [{"body": videos[0], "label": b"LABEL_0"}])
    assert (statuses, answers[0]["error"]["code"]) == ([400], "unknown_parameter")


def test_explanations_limited_per_batch(handler, videos, monkeypatch):
    options = dataclasses.replace(handler.classifier.options, max_batch_explain_s=1e-9)
    monkeypatch.setattr(handler.classifier, "options", options)
    rows = [{"body": videos[0]}] * 3
    answers, statuses = handle(handler, rows, headers=[{"explain": "True"}, {}, {"explain": "True"}])
    assert statuses == [200, 200, 503] and answers[2]["error"]["code"] == "explanations_busy"


def test_unexpected_decoder_error_reported_with_id(handler, videos, monkeypatch, caplog):
    load_clips = handler.decoders.load_clips

    def fail_on_second(sources, **options):
        clips = load_clips(sources, **options)
        return [clips[0], ZeroDivisionError("a secret path"), clips[2]]

    monkeypatch.setattr(handler.decoders, "load_clips", fail_on_second)
    with caplog.at_level(logging.ERROR):
        answers, statuses = handle(handler, [{"body": data} for data in videos])
    assert statuses == [200, 500, 200]
    assert "id-1" in answers[1]["error"]["message"] and "secret" not in json.dumps(answers)
    assert "id-1" in caplog.text and "a secret path" in caplog.text


def test_failed_forward_passes_reported_per_request(handler, videos, monkeypatch):
    logits = torch.arange(9.0)[None], torch.zeros(1, 32)
    results = [RuntimeError("an error"), logits, torch.cuda.OutOfMemoryError("CUDA out of memory")]
    monkeypatch.setattr(handler.classifier, "view_outputs_or_errors", lambda clips, **options: results)
    answers, statuses = handle(handler, [{"body": data} for data in videos])
    assert statuses == [500, 200, 507]
    assert [answers[index]["error"]["code"] for index in (0, 2)] == ["internal_error", "out_of_memory"]
    assert all(f"id-{index}" in answers[index]["error"]["message"] for index in (0, 2))
    assert answers[1]["predictions"][0]["label"] == "LABEL_8"


@pytest.mark.parametrize(
    "changes",
    [
        {"times_s": np.array(["a", "b"])},
        {"info": None},
        {"warnings": [b"bytes"]},
        {"times_s": np.array([np.nan])},
        {"frames": np.zeros((7, 3, 32, 32), np.uint8)},
    ],
    ids=str,
)
def test_implausible_clip_fails_alone(handler, videos, monkeypatch, changes):
    load_clips = handler.decoders.load_clips

    def spoil_second(sources, **options):
        clips = load_clips(sources, **options)
        return [clips[0], dataclasses.replace(clips[1], **changes), clips[2]]

    monkeypatch.setattr(handler.decoders, "load_clips", spoil_second)
    answers, statuses = handle(handler, [{"body": data} for data in videos])
    assert statuses == [200, 500, 200]
    assert answers[1]["error"]["code"] == "internal_error" and "id-1" in answers[1]["error"]["message"]


def test_worker_exits_when_gpu_failed(handler, videos, monkeypatch, caplog):
    def fail(clips, **options):
        raise DeviceError("cuda:0 has failed")

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(handler.classifier, "view_outputs_or_errors", fail)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    with caplog.at_level(logging.CRITICAL), pytest.raises(SystemExit) as exit:
        handle(handler, [{"body": videos[0]}])
    assert exit.value.code == 1
    assert "cuda:0 has failed" in caplog.text


@pytest.fixture
def threads(monkeypatch, handler):
    """Replaces the decision about threads, the clock and torch's setting; `applied` lists torch's settings."""

    class Threads:
        wanted, now_s, applied = 8, 1000.0, [0]

    monkeypatch.setattr(handler, "_next_threads_update_s", 0.0)
    monkeypatch.setattr(vivit_handler, "worker_inference_threads", lambda **options: Threads.wanted)
    monkeypatch.setattr(vivit_handler.time, "monotonic", lambda: Threads.now_s)
    monkeypatch.setattr(torch, "set_num_threads", Threads.applied.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: Threads.applied[-1])
    # The model sets torch's threads as well.
    outputs = torch.zeros(1, 9), torch.zeros(1, 32)
    monkeypatch.setattr(handler.classifier, "view_outputs_or_errors", lambda clips, **options: [outputs] * len(clips))
    return Threads


def test_threads_follow_scaling(handler, videos, threads):
    # 4 is wanted for less than the interval of a second; None keeps torch's setting.
    for wanted, seconds in ((8, 2), (4, 0.5), (8, 0.2), (2, 0.5), (2, 2), (None, 2), (8, 2)):
        threads.wanted = wanted
        threads.now_s += seconds
        handle(handler, [{"body": videos[0]}])
    assert threads.applied[1:] == [8, 2, 8]


@pytest.mark.parametrize("compile, device", [(True, "cpu"), (False, "cuda")])
def test_threads_fixed_for_compiled_model_and_gpu(handler, videos, threads, monkeypatch, compile, device):
    monkeypatch.setattr(handler.classifier, "options", dataclasses.replace(handler.classifier.options, compile=compile))
    monkeypatch.setattr(handler, "device", torch.device(device))
    handle(handler, [{"body": videos[0]}])
    assert threads.applied[1:] == []


@pytest.mark.parametrize("options, processes, threads", [({}, 8, 64), ({"decode_processes": 3}, 3, 3)])
def test_decoder_pool_no_larger_than_batch(checkpoint, monkeypatch, options, processes, threads):
    pool = MagicMock()
    monkeypatch.setattr(vivit_handler, "available_cores", lambda: 64)
    monkeypatch.setattr(vivit_handler, "DecoderPool", pool)
    VivitHandler().initialize(make_context(checkpoint, settings={"handler": options}))
    assert pool.call_args.kwargs == {"processes": processes, "threads": threads}


def test_metrics_match_shipped_configuration(handler, videos, caplog):
    metrics = handler.context.metrics
    declared = {kind: set(named) for kind, named in metrics.cache.items()}
    with caplog.at_level(logging.INFO):
        handle(handler, [{"body": videos[0]}, {"body": b"hello"}, {"body": videos[1]}])
    reported = re.findall(r"\[METRICS\](\w+)\.(\w+):([\d.]+)\|#([^|]*)\|", caplog.text)
    values = {name: float(value) for name, unit, value, dimensions in reported}
    assert (values["vivit_batch_clips"], values["vivit_clips_total"]) == (2, 2)
    decoded = [float(value) for name, _, value, _ in reported if name == "vivit_decoded_frames_total"]
    assert decoded == [handler.classifier.load_clip(video).decoded_frames for video in videos[:2]]
    assert {"vivit_decode_seconds", "vivit_resize_seconds", "vivit_inference_seconds"} <= values.keys()
    (rejected,) = [dimensions for name, _, _, dimensions in reported if name == "vivit_rejected_requests_total"]
    assert rejected == "Code:not_a_video,ModelName:vivit,Level:Model"
    assert {kind: set(named) for kind, named in metrics.cache.items()} == declared


def test_description_of_shipped_configuration(handler, checkpoint):
    card = handler.describe_handle()
    assert json.loads(json.dumps(card)) == card
    assert card["labels"] == [f"LABEL_{index}" for index in range(9)]
    assert card["attention_type"] == "spatiotemporal"
    assert card["parameters"] == sum(parameter.numel() for parameter in handler.classifier.model.parameters())
    assert card["multiply_adds_per_clip"] == count_multiply_adds(handler.classifier.config)
    assert card["clip"] == {"frames": 8, "height": 32, "width": 32, "sampling": "uniform", "views": "1x1"}
    assert card["options"] == dataclasses.asdict(HandlerOptions())
    assert len(card["sandbox"]["active"] + card["sandbox"]["missing"]) >= 1
    classifier = handler.classifier
    assert (card["attention"], card["dtype"], card["device"]) == ("sdpa", str(classifier.dtype)[6:], "cpu")
    assert card["dtype_reason"] == classifier.dtype_reason
    assert (card["versions"]["vivit"], card["versions"]["torch"]) == (__version__, torch.__version__)
    assert card["weights_sha256"] == hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()


def test_options_of_archive_applied(checkpoint):
    handler = VivitHandler()
    options = {"dtype": "bfloat16", "top_k": 2, "max_upload_bytes": 10}
    handler.initialize(make_context(checkpoint, settings={"responseTimeout": 1, "handler": options}))
    assert handler.classifier.dtype == torch.bfloat16
    (answer,), statuses = handle(handler, [{"body": bytes(11)}])
    assert (statuses, answer["error"]["code"]) == ([413], "upload_too_large")
    assert (handler.limits.default_top_k, handler.limits.max_top_k) == (2, 9)


def test_several_label_heads(checkpoint, videos, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = dict(enumerate([*("onion", "pan", "cut", "cup", "door"), *("cut", "wash", "open", "take")]))
    (tmp_path / "config.json").write_text(json.dumps({**config, "label_heads": {"noun": 5, "verb": 4}, "label2id": {}}))
    handler = VivitHandler()
    handler.initialize(make_context(tmp_path))
    rows = [{"body": videos[0]}, {"body": videos[0], "top_k": b"2"}, {"body": videos[0], "top_k": b"6"}]
    answers, statuses = handle(handler, rows)
    handler.decoders.close()
    assert statuses == [200, 200, 400]
    assert "from 1 to 5" in answers[2]["error"]["message"]
    for answer, k in zip(answers, (5, 2)):
        heads, best = answer["heads"], answer["predictions"][0]
        assert {name: len(labels) for name, labels in heads.items()} == {"noun": k, "verb": min(k, 4)}
        assert len(answer["predictions"]) == k
        assert best["labels"] == {"noun": heads["noun"][0]["label"], "verb": heads["verb"][0]["label"]}
        assert best["label"] == f"{best['labels']['noun']} + {best['labels']['verb']}"
        assert best["score"] == pytest.approx(heads["noun"][0]["score"] * heads["verb"][0]["score"])
    card = handler.describe_handle()
    assert card["heads"] == {"noun": card["labels"][:5], "verb": card["labels"][5:]}


@pytest.mark.parametrize(
    "settings, cause", [({"handler": {"topk": 1}}, "did you mean 'top_k'"), ({}, "config.json")], ids=["option", "file"]
)
def test_failed_initialization_names_cause(tmp_path, checkpoint, settings, cause):
    model_dir = checkpoint if settings else tmp_path
    with pytest.raises(RuntimeError, match=f"model vivit cannot be served: .*{cause}"):
        VivitHandler().initialize(make_context(model_dir, settings=settings))


def test_decoder_processes_stop_if_weights_cannot_be_loaded(tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    before = set(psutil.Process().children())
    with pytest.raises(RuntimeError, match="model.safetensors"):
        VivitHandler().initialize(make_context(tmp_path))
    assert not set(psutil.Process().children()) - before  # those of earlier tests may exit meanwhile


def test_decoder_processes_start_before_weights_are_loaded(checkpoint, monkeypatch):
    before = psutil.Process().children()
    started = []

    def load(*args, **kwargs):
        started.extend(child for child in psutil.Process().children() if child not in before)
        raise CheckpointError("stop here")

    monkeypatch.setattr(vivit_handler.VideoClassifier, "from_pretrained", load)
    with pytest.raises(RuntimeError, match="stop here"):
        VivitHandler().initialize(make_context(checkpoint))
    assert started


def test_assigned_device(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert assigned_device(2) == assigned_device("2") == torch.device("cuda", 2)
    assert assigned_device(None) == torch.device("cpu")
    with pytest.raises(RuntimeError, match=r"assigned GPU 3, but torch finds 3 \(numbered from 0\): check CUDA_V"):
        assigned_device(3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert assigned_device(0) == torch.device("cpu")
    assert "cannot use it" in caplog.text


# Workarounds for TorchServe


def received(*names_and_values, headers=()):
    """A request as TorchServe's worker reads it from the front end."""
    return {
        "requestId": b"id",
        "headers": [{"name": name.encode(), "value": value.encode()} for name, value in headers],
        "parameters": [{"name": name, "value": value, "contentType": ""} for name, value in names_and_values],
    }


def test_repeated_parts_rejected(handler, videos):
    batch = [
        received(("video", videos[0]), ("video", videos[1])),
        received(("video", videos[0]), headers=[("X-Top-K", "2")]),
        received(("body", videos[0]), ("top_k", b"1"), ("top_k", b"2")),
    ]
    processors, rows, _ = Service.retrieve_data_for_inference(batch)
    headers = [processor.get_request_properties() for processor in processors]
    answers, statuses = handle(handler, rows, headers=headers)
    assert statuses == [400, 200, 400]
    assert [answers[index]["error"]["code"] for index in (0, 2)] == ["several_videos", "bad_parameter"]
    assert len(answers[1]["predictions"]) == 2


def rejected_requests(size):
    """Requests of about `size` bytes, each rejected for another reason."""
    base64_video = b"A" * size
    return {
        "bad base64 at the end": b'{"video": "' + base64_video + b'?"}',
        "emoji": b'{"video": "' + base64_video + "\U0001f600".encode() + b'"}',
        "escaped emoji": b'{"video": "' + base64_video + b'\\ud83d\\ude00"}',
        "unterminated JSON": b'{"video": "' + base64_video,
        "repeated key": b'{"video": "' + base64_video[::2] + b'", "video": "' + base64_video[::2] + b'"}',
        "unknown key": b'{"video": "' + base64_video + b'", "frames": 3}',
        "long name": b'{"video": "", "' + base64_video + b'": 3}',
        "long top_k": b'{"video": "AAAA", "top_k": "' + base64_video + b'"}',
        "not base64": b'{"video": ["' + base64_video + b'"]}',
        "list as top_k": b'{"video": "AAAA", "top_k": ["' + b"\x7f" * size + b'"]}',
        "not a video": b'{"video": "' + base64_video + b'"}',
        "data URL": b'{"video": "data:video/mp4;base64,' + base64_video + b'"}',
        "URL": b"https://example.com/" + base64_video,
        "raw": base64_video,
        "explanation": base64_video,
    }


def memory_of_preprocess(handler, bodies, *, headers=()):
    """(jobs, peak, kept): the jobs of a batch, and the memory during preprocess and after it in bytes.

    Args:
        bodies: yields each body without keeping it.
        headers: the headers of each request.
    """
    context = handler.context
    gc.disable()  # what it would free may be left for a long time
    tracemalloc.start()
    try:
        messages = [received(("body", body), headers=headers) for body in bodies]
        context.request_processor, rows, context.request_ids = Service.retrieve_data_for_inference(messages)
        jobs = handler.preprocess(rows)
        kept, peak = tracemalloc.get_traced_memory()
        return jobs, peak, kept
    finally:
        tracemalloc.stop()
        gc.enable()


@pytest.mark.parametrize("kind", rejected_requests(1))
def test_memory_of_rejected_requests(handler, kind):
    size = 300_000
    body = rejected_requests(size)[kind]
    headers = [("explain", "True")] if kind == "explanation" else []
    jobs, peak, kept = memory_of_preprocess(handler, (bytearray(body) for _ in range(8)), headers=headers)
    assert all(job.error is not None for job in jobs)
    assert peak < (8 + 2.2) * size and kept < 0.3 * size


def test_memory_of_accepted_requests(handler, videos):
    body = json.dumps({"video": base64.b64encode(videos[0] + bytes(300_000)).decode()}).encode()
    jobs, peak, kept = memory_of_preprocess(handler, (bytearray(body) for _ in range(8)))
    clip_bytes = sum(job.clip.pixels.nbytes for job in jobs)
    assert peak < (8 + 2.2) * len(body) and kept - clip_bytes < 0.3 * len(body)


def test_grpc_response_ends_stream(handler, videos):
    """TorchServe adds the content type of each part to the headers; a gRPC request has no other headers."""
    part = {"content-type": ""}
    rows = [{"data": videos[0]}, {"video": videos[0]}]
    handle(handler, rows, headers=[{"data": part}, {"video": part, "Host": "a"}])
    responses = [handler.context.get_response_headers(index) for index in (0, 1)]
    assert [response.get("ts_stream_next") for response in responses] == ["false", None]
    assert [response["content-type"] for response in responses] == ["application/json"] * 2


def test_stream_with_sequence_gets_no_response(handler, videos):
    rows = [{"data": videos[0]}, {"data": videos[0]}]
    sequence = {"ts_request_sequence_id": "a", "ts_request_sequence_start": "true"}
    answers, statuses = handle(handler, rows, headers=[sequence, {**sequence, "Host": "a REST client"}])
    assert (statuses, answers[0]["error"]["code"]) == ([501, 200], "not_supported")
    assert handler.context.request_ids == {1: "id-1"}


SERVER_AND_WORKERS = """
import subprocess, sys, time
if len(sys.argv) > 1:
    workers = [subprocess.Popen([sys.executable, sys.argv[0]], stdin=subprocess.PIPE) for _ in range(int(sys.argv[1]))]
    time.sleep(0.2)
    workers[0].communicate(b"exit unnoticed")
    for worker in workers[1:]:
        worker.communicate(b"exit")
elif sys.stdin.readline() == "exit unnoticed":
    from handler.torchserve_compat import stop_server_without_workers
    stop_server_without_workers(patience_s=0.2)
"""


@pytest.mark.parametrize("workers, status", [(1, -signal.SIGTERM), (2, 0)])
def test_server_stopped_after_losing_last_worker(tmp_path, workers, status):
    script = tmp_path / "worker.py"
    script.write_text(SERVER_AND_WORKERS)
    # A stub, because importing TorchServe takes seconds.
    for module, name in (("service", "Service"), ("torch_handler/base_handler", "BaseHandler")):
        path = tmp_path / "stub" / "ts" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(f"class {name}: retrieve_data_for_inference = None\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'stub'}{os.pathsep}{ROOT}"}
    server = subprocess.run([sys.executable, script, str(workers)], env=environment)
    assert server.returncode == status
