"""TorchServe's hooks, called as a worker calls them, without the server."""

import dataclasses
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ts.context import Context, RequestProcessor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from handler import vivit_handler
from handler.classifier import DeviceError
from handler.options import HandlerOptions
from handler.vivit_handler import VivitHandler, _assigned_device
from tests.support.clips import audio_only, numbered_frames, write_clip

ROOT = Path(__file__).resolve().parents[2]


def make_metrics():
    """TorchServe's own metrics, as a worker makes them from the configuration that ships."""
    metrics = MetricsCacheYamlImpl(config_file_path=str(ROOT / "handler" / "assets" / "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = "vivit"
    return metrics


def make_context(model_dir, *, settings={}, gpu_id=None):
    return Context("vivit", str(model_dir), {}, 8, gpu_id, "0.12", metrics=make_metrics(), model_yaml_config=settings)


@pytest.fixture(scope="module")
def handler(checkpoint):
    handler = VivitHandler()
    handler.initialize(make_context(checkpoint))
    return handler


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Bytes of three good videos."""
    folder = tmp_path_factory.mktemp("clips")
    return [
        write_clip(folder / "a.mp4", numbered_frames(30, seed=1)).read_bytes(),
        write_clip(folder / "b.webm", numbered_frames(21, height=90, width=64, seed=2), codec="libvpx").read_bytes(),
        write_clip(folder / "c.mkv", numbered_frames(12, height=48, width=48, seed=3)).read_bytes(),
    ]


def handle(handler, rows, *, headers=None):
    """(answers, statuses) of one batch."""
    context = handler.context
    context.request_ids = {index: f"id-{index}" for index in range(len(rows))}
    context.metrics.request_ids = context.request_ids
    context.request_processor = [RequestProcessor(dict(each)) for each in headers or [{}] * len(rows)]
    answers = handler.handle(rows, context)
    assert len(answers) == len(rows)
    json.dumps(answers)
    return answers, [context.get_response_status(index)[0] for index in range(len(rows))]


def test_an_answer_tells_predictions_video_and_warnings(handler, videos):
    (answer,), statuses = handle(handler, [{"body": bytearray(videos[0])}])
    assert statuses == [200]
    assert len(answer["predictions"]) == 5
    assert answer["video"]["frame_count"] == 30
    assert (answer["video"]["width"], answer["video"]["height"], answer["video"]["codec"]) == (176, 144, "h264")
    assert len(answer["video"]["frames"]) == 8
    assert answer["warnings"] == []


def test_every_request_of_a_mixed_batch_gets_its_own_answer(handler, videos, tmp_path):
    sound = audio_only(tmp_path / "a.m4a").read_bytes()
    bad = [b"", b"hello", b'{"video": 3}', b"ffconcat version 1.0\nfile a.mp4\n", videos[0][:200], sound]
    rows = [{"body": videos[0]}, *({"body": data} for data in bad), {"body": videos[1]}, {"body": videos[2]}]
    answers, statuses = handle(handler, rows)
    assert statuses == [200, 400, 415, 400, 415, 422, 422, 200, 200]
    codes = [answer["error"]["code"] for answer in answers if "error" in answer]
    assert codes == [
        "empty_body",
        "not_a_video",
        "bad_base64",
        "unsupported_container",
        "corrupt_video",
        "no_video_stream",
    ]
    for index, data in ((0, videos[0]), (7, videos[1]), (8, videos[2])):
        (alone,), _ = handle(handler, [{"body": data}])
        labels = [each["label"] for each in alone["predictions"]]
        assert [each["label"] for each in answers[index]["predictions"]] == labels
        assert answers[index]["predictions"][0]["score"] == pytest.approx(alone["predictions"][0]["score"], abs=1e-5)
        assert answers[index]["video"] == alone["video"]


def test_top_k_is_obeyed_per_request(handler, videos):
    rows = [{"body": videos[0]}, {"data": videos[0], "top_k": b"1"}, {"body": videos[0]}]
    answers, _ = handle(handler, rows, headers=[{}, {}, {"X-Top-K": "9"}])
    assert [len(answer["predictions"]) for answer in answers] == [5, 1, 9]


def test_explanations_are_refused_without_harm_to_the_batch(handler, videos):
    rows = [{"body": videos[0]}, {"body": videos[0]}]
    answers, statuses = handle(handler, rows, headers=[{"explain": "True"}, {"explain": "False"}])
    assert statuses == [501, 200]
    assert answers[0]["error"]["code"] == "not_supported"


def test_the_unforeseen_in_one_request_is_a_500_with_an_id_that_the_log_has(handler, videos, monkeypatch, caplog):
    load_clips = handler.decoders.load_clips

    def fail_on_the_second(sources):
        clips = load_clips(sources)
        return [clips[0], ZeroDivisionError("a secret path"), clips[2]]

    monkeypatch.setattr(handler.decoders, "load_clips", fail_on_the_second)
    with caplog.at_level(logging.ERROR):
        answers, statuses = handle(handler, [{"body": data} for data in videos])
    assert statuses == [200, 500, 200]
    assert "id-1" in answers[1]["error"]["message"] and "secret" not in json.dumps(answers)
    assert "id-1" in caplog.text and "a secret path" in caplog.text


@pytest.mark.parametrize(
    "error, status, code",
    [
        (RuntimeError("out of luck"), 500, "internal_error"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), 507, "out_of_memory"),
    ],
)
def test_a_clip_that_breaks_the_forward_pass_costs_only_its_own_request(
    handler, videos, monkeypatch, error, status, code
):
    forward = handler.classifier._forward
    (poison,) = handler.decoders.load_clips([videos[1]])

    def fail_on_poison(pixels):
        if any((clip == poison.pixels[0]).all() for clip in pixels):
            raise error
        return forward(pixels)

    monkeypatch.setattr(handler.classifier, "_forward", fail_on_poison)
    answers, statuses = handle(handler, [{"body": data} for data in videos])
    assert statuses == [200, status, 200]
    assert answers[1]["error"]["code"] == code and "id-1" in answers[1]["error"]["message"]


def test_a_worker_whose_gpu_has_failed_for_good_says_so_and_ends_at_once(handler, videos, monkeypatch, caplog):
    def fail(clips):
        raise DeviceError("cuda:0 has failed for good")

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(handler.classifier, "logits_or_errors", fail)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    with caplog.at_level(logging.CRITICAL), pytest.raises(SystemExit) as ended:
        handle(handler, [{"body": videos[0]}])
    assert ended.value.code == 1
    assert "cuda:0 has failed for good" in caplog.text


class Cores:
    """What a worker sees of its server and of torch; `threads` are those that torch was told to use."""

    def __init__(self, monkeypatch):
        self.workers, self.now_s, self.threads = 1, 1000.0, [0]
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(vivit_handler, "available_cores", lambda: 8)
        monkeypatch.setattr(vivit_handler, "_count_workers", lambda: self.workers)
        monkeypatch.setattr(vivit_handler.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(torch, "set_num_threads", self.threads.append)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads[-1])


@pytest.fixture
def cores(monkeypatch, handler):
    monkeypatch.setattr(handler, "_next_look_s", 0.0)
    monkeypatch.setattr(handler.classifier, "useful_threads", 100)
    return Cores(monkeypatch)


def test_workers_share_the_cores_and_notice_that_they_are_scaled(handler, videos, cores):
    for workers, expected in ((1, 8), (3, 2), (3, 2), (20, 1), (1, 8)):
        cores.workers = workers
        cores.now_s += 2
        handle(handler, [{"body": videos[0]}])
        assert cores.threads[-1] == expected
    assert cores.threads[1:] == [8, 2, 1, 8]


def test_a_small_model_gets_fewer_threads_than_its_share(handler, cores, monkeypatch):
    monkeypatch.setattr(handler.classifier, "useful_threads", 3)
    handler._share_cores()
    assert cores.threads[1:] == [3]


def test_workers_look_at_each_other_no_more_than_once_a_second(handler, cores):
    handler._share_cores()
    cores.workers = 2
    cores.now_s += 0.5
    handler._share_cores()
    assert cores.threads[1:] == [8]
    cores.now_s += 0.6
    handler._share_cores()
    assert cores.threads[1:] == [8, 4]


def test_threads_that_an_operator_chose_are_obeyed(handler, cores, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    handler._share_cores()
    assert cores.threads[1:] == []
    cores.now_s += 2
    options = dataclasses.replace(handler.classifier.options, inference_threads=5)
    monkeypatch.setattr(handler.classifier, "options", options)
    handler._share_cores()
    assert cores.threads[1:] == [5]


def test_compiled_code_keeps_the_threads_that_it_was_made_for(handler, cores, monkeypatch):
    options = dataclasses.replace(handler.classifier.options, compile=True)
    monkeypatch.setattr(handler.classifier, "options", options)
    monkeypatch.setattr(handler, "initialized", False)
    handler._share_cores()
    monkeypatch.setattr(handler, "initialized", True)
    cores.workers = 2
    cores.now_s += 2
    handler._share_cores()
    assert cores.threads[1:] == [8]


def test_threads_are_left_alone_where_a_gpu_computes(handler, cores, monkeypatch):
    monkeypatch.setattr(handler, "device", torch.device("cuda", 1))
    handler._share_cores()
    assert cores.threads[1:] == []


@pytest.mark.parametrize("settings, processes, threads", [({}, 8, 64), ({"decode_processes": 3}, 3, 3)])
def test_a_worker_has_a_decoder_for_each_file_of_a_batch_at_most(checkpoint, monkeypatch, settings, processes, threads):
    made = []
    monkeypatch.setattr(vivit_handler, "available_cores", lambda: 64)
    monkeypatch.setattr(vivit_handler, "DecoderPool", lambda _, **arguments: made.append(arguments))
    VivitHandler().initialize(make_context(checkpoint, settings={"handler": settings}))
    assert made == [{"processes": processes, "threads": threads}]


LEAVING = """
import subprocess, sys, time
if len(sys.argv) > 1:
    workers = [subprocess.Popen([sys.executable, sys.argv[0]], stdin=subprocess.PIPE) for _ in range(int(sys.argv[1]))]
    time.sleep(1)
    workers[0].communicate(b"leave")
    for worker in workers[1:]:
        worker.communicate(b"end")
elif sys.stdin.readline() == "leave":
    from handler.vivit_handler import end_a_server_without_workers
    end_a_server_without_workers(patience_s=0.2)
"""


@pytest.mark.parametrize("workers, status", [(1, -signal.SIGTERM), (2, 0)])
def test_a_server_that_has_lost_its_last_worker_without_noticing_is_ended(tmp_path, workers, status):
    script = tmp_path / "worker.py"
    script.write_text(LEAVING)
    server = subprocess.run([sys.executable, script, str(workers)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert server.returncode == status


COUNTING = """
import subprocess, sys
if len(sys.argv) > 1:
    others = [subprocess.Popen([sys.executable, sys.argv[0]], stdin=subprocess.PIPE) for _ in range(2)]
    others += [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)]
    counting = subprocess.run([sys.executable, sys.argv[0]], input=b"count", stdout=subprocess.PIPE)
    print(counting.stdout.decode())
    for process in others:
        process.communicate(b"end")
elif sys.stdin.readline() == "count":
    from handler.vivit_handler import _count_workers
    print(_count_workers())
"""


def test_workers_are_counted_among_all_that_their_parent_started(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(COUNTING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, "parent"], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "3", done.stderr


def test_a_header_of_one_request_does_not_decide_over_its_batch(handler, videos):
    rows = [{"body": videos[0]}, {"body": videos[1]}]
    answers, statuses = handle(handler, rows, headers=[{"describe": "True"}, {}])
    assert statuses == [200, 200]
    assert all("predictions" in answer for answer in answers)


def test_what_happened_is_reported_in_metrics_that_the_shipped_configuration_knows(handler, videos, caplog):
    metrics = handler.context.metrics
    known = {kind: set(named) for kind, named in metrics.cache.items()}
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
    assert {kind: set(named) for kind, named in metrics.cache.items()} == known


def test_describing_tells_labels_clip_options_and_versions(handler):
    (card,), _ = handle(handler, [{}], headers=[{"describe": "True"}])
    assert json.loads(json.dumps(card)) == card
    assert card["labels"] == [f"LABEL_{index}" for index in range(9)]
    assert card["clip"] == {"frames": 8, "height": 32, "width": 32, "sampling": "uniform"}
    assert (card["attention"], card["options"]["max_frames"]) == ("sdpa", HandlerOptions().max_frames)
    assert (card["dtype"], card["device"], card["options"]["dtype"]) == ("float32", "cpu", "auto")
    assert card["versions"]["torch"] == torch.__version__


def test_the_card_tells_which_weights_are_served(handler, checkpoint):
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert handler.describe_handle()["weights_sha256"] == hashlib.sha256(weights).hexdigest()


def test_settings_of_the_archive_are_obeyed(checkpoint):
    handler = VivitHandler()
    handler.initialize(make_context(checkpoint, settings={"responseTimeout": 1, "handler": {"dtype": "bfloat16"}}))
    assert handler.classifier.dtype == torch.bfloat16


def test_the_shipped_configuration_is_the_defaults(checkpoint, handler):
    with open(ROOT / "handler" / "assets" / "model-config.yaml") as file:
        settings = yaml.safe_load(file)
    shipped = VivitHandler()
    shipped.initialize(make_context(checkpoint, settings=settings))
    assert shipped.classifier.options == handler.classifier.options


@pytest.mark.parametrize("settings, cause", [({"handler": {"topk": 1}}, "did you mean 'top_k'"), ({}, "config.json")])
def test_a_model_that_cannot_be_served_fails_with_its_cause(tmp_path, checkpoint, settings, cause):
    model_dir = checkpoint if settings else tmp_path
    with pytest.raises(RuntimeError, match=f"model vivit cannot be served: .*{cause}"):
        VivitHandler().initialize(make_context(model_dir, settings=settings))


def test_the_assigned_gpu_is_used_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _assigned_device(2) == torch.device("cuda", 2)
    assert _assigned_device(None) == torch.device("cpu")


def test_without_a_gpu_the_model_runs_on_the_cpu_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert _assigned_device(0) == torch.device("cpu")
    assert "cannot use it" in caplog.text
