"""End to end: archives built as users build them, a real TorchServe, real requests over REST and gRPC."""

import base64
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
import transformers
from google.protobuf import empty_pb2

from handler.cli.build import build_archive
from handler.cli.client import classify_grpc, classify_rest, load_proto, open_channel
from handler.cli.server import Server, on_free_ports, read_properties, write_properties
from handler.video import decode_frames
from tests.support.clips import audio_only, numbered_frames, write_clip

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def server(checkpoint, tmp_path_factory):
    """config.properties as shipped but for the ports, and the model control API switched on."""
    folder = tmp_path_factory.mktemp("server")
    store = folder / "store"
    build_archive(checkpoint=str(checkpoint), name="vivit", version="1.0", export_path=store)
    build_archive(checkpoint=str(checkpoint), name="other", version="2.0", export_path=store)
    properties = {**on_free_ports(read_properties(ROOT / "config.properties")), "enable_model_api": "true"}
    config = write_properties(folder / "config.properties", properties)
    with Server(config=config, model_store=store, directory=folder / "run") as server:
        server.wait_until_ready("vivit")
        yield server


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [
        write_clip(folder / "a.mp4", numbered_frames(30, seed=1)),
        write_clip(folder / "b.webm", numbered_frames(21, height=90, width=64, seed=2), codec="libvpx"),
        write_clip(folder / "c.mkv", numbered_frames(12, height=48, width=48, seed=3)),
        write_clip(folder / "d.ts", numbered_frames(40, height=72, width=96, seed=4)),
    ]


def post(server, data=None, *, model="vivit", headers={}, **options):
    return requests.post(
        f"{server.inference_url}/predictions/{model}",
        data=data,
        headers={**server.headers("inference"), **headers},
        timeout=120,
        **options,
    )


def manage(server, method, path, **params):
    return requests.request(
        method, f"{server.management_url}{path}", params=params, headers=server.headers("management"), timeout=120
    )


def rest(server, clip, *, model="vivit", **parameters):
    token = server.token("inference")
    return classify_rest(clip, url=server.inference_url, model=model, parameters=parameters, token=token).body


def over_grpc(server, clip, *, model="vivit", **parameters):
    token = server.token("inference")
    return classify_grpc(clip, address=server.grpc_inference, model=model, parameters=parameters, token=token).body


@pytest.mark.parametrize("ask", [rest, over_grpc])
def test_served_scores_are_those_of_transformers_for_the_same_frames(server, checkpoint, clips, ask):
    processor = transformers.VivitImageProcessor.from_pretrained(checkpoint)
    model = transformers.VivitForVideoClassification.from_pretrained(checkpoint)
    for clip in clips:
        answer = ask(server, clip, top_k=9)
        indices = np.rint(np.array(answer["video"]["frames"]) * answer["video"]["fps"]).astype(int)
        frames = decode_frames(clip, indices)
        with torch.no_grad():
            expected = model(**processor(list(frames), return_tensors="pt")).logits[0].softmax(-1)
        scores = {each["label"]: each["score"] for each in answer["predictions"]}
        got = torch.tensor([scores[model.config.id2label[index]] for index in range(9)])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_every_way_to_send_a_video_gives_the_same_answer(server, clips):
    data = clips[0].read_bytes()
    answers = [
        post(server, data).json(),
        post(server, data, headers={"Content-Type": "video/mp4"}).json(),
        post(server, data, headers={"Content-Type": "text/plain"}).json(),
        post(server, files={"video": data}).json(),
        post(server, files={"data": data}).json(),
        post(server, json={"video": base64.b64encode(data).decode()}).json(),
        rest(server, clips[0]),
        over_grpc(server, clips[0]),
    ]
    assert len(answers[0]["predictions"]) == 5
    assert all(answer == answers[0] for answer in answers)


def test_every_way_to_ask_for_top_k_is_obeyed(server, clips):
    data = clips[0].read_bytes()
    answers = [
        post(server, data, headers={"X-Top-K": "2"}).json(),
        post(server, {"top_k": "2"}, files={"video": data}).json(),
        post(server, json={"video": base64.b64encode(data).decode(), "top_k": 2}).json(),
        requests.post(
            f"{server.inference_url}/invocations",
            params={"model_name": "vivit", "top_k": 2},
            data=data,
            headers=server.headers("inference"),
        ).json(),
        rest(server, clips[0], top_k=2),
        over_grpc(server, clips[0], top_k=2),
    ]
    assert [len(answer["predictions"]) for answer in answers] == [2] * len(answers)


def test_uploads_sent_together_get_each_its_own_status_and_the_good_ones_their_own_answer(server, clips, tmp_path):
    good = [clip.read_bytes() for clip in clips]
    bad = {
        "truncated": (good[0][: len(good[0]) // 2], 422),
        "empty": (b"", 400),
        "audio only": (audio_only(tmp_path / "a.m4a").read_bytes(), 422),
        "playlist": (b"ffconcat version 1.0\nfile a.mp4\n", 415),
        "HLS": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", 415),
        "text": (b"hello", 415),
    }
    alone = [post(server, data).json()["predictions"] for data in good]
    bodies = [*good, *(data for data, _ in bad.values())] * 3
    with ThreadPoolExecutor(len(bodies)) as pool:
        responses = list(pool.map(lambda data: post(server, data), bodies))
    statuses = [response.status_code for response in responses]
    assert statuses == ([200] * len(good) + [status for _, status in bad.values()]) * 3
    for index, response in enumerate(responses):
        answer = response.json()
        if response.status_code == 200:
            expected = alone[index % (len(good) + len(bad))]
            assert [each["label"] for each in answer["predictions"]] == [each["label"] for each in expected]
            np.testing.assert_allclose(
                [each["score"] for each in answer["predictions"]], [each["score"] for each in expected], atol=1e-5
            )
        else:
            assert set(answer["error"]) == {"code", "message"}


def test_grpc_carries_the_error_in_the_body(server, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("hello")
    assert over_grpc(server, text)["error"]["code"] == "not_a_video"


def test_json_over_grpc_is_understood(server, clips):
    messages, services = load_proto("inference.proto")
    body = json.dumps({"video": base64.b64encode(clips[0].read_bytes()).decode(), "top_k": 1}).encode()
    with open_channel(server.grpc_inference) as channel:
        response = services.InferenceAPIsServiceStub(channel).Predictions(
            messages.PredictionsRequest(model_name="vivit", input={"data": body}), metadata=authorization(server)
        )
    assert len(json.loads(response.prediction)["predictions"]) == 1


@pytest.mark.parametrize("body, key", [(None, "predictions"), (b"hello", "error")])
def test_streamed_over_grpc_comes_the_same_answer_and_the_stream_ends(server, clips, body, key):
    messages, services = load_proto("inference.proto")
    request = messages.PredictionsRequest(model_name="vivit", input={"data": body or clips[0].read_bytes()})
    with open_channel(server.grpc_inference) as channel:
        stub = services.InferenceAPIsServiceStub(channel)
        alone = stub.Predictions(request, metadata=authorization(server), timeout=60)
        streamed = list(stub.StreamPredictions(request, metadata=authorization(server), timeout=60))
    assert [response.prediction for response in streamed] == [alone.prediction]
    assert key in json.loads(alone.prediction)


def test_a_form_without_fields_is_told_what_was_expected(server, clips):
    body = clips[0].read_bytes().replace(b"%", b"")  # TorchServe itself answers a broken %XX, with 500
    response = post(server, body, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_video"


@pytest.fixture(scope="session")
def large_clip(tmp_path_factory):
    """Noise does not compress: larger than TorchServe's and gRPC's own limits of 6.5 and 4 MB."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 288, 352, 3), np.uint8)
    path = write_clip(tmp_path_factory.mktemp("large") / "large.mkv", noise, codec="ffv1")
    assert path.stat().st_size > 7_000_000
    return path


@pytest.mark.parametrize("ask", [rest, over_grpc])
def test_a_video_larger_than_the_servers_own_limits_is_served(server, large_clip, ask):
    assert "predictions" in ask(server, large_clip)


def test_without_a_token_nothing_is_answered(server, clips):
    assert classify_rest(clips[0], url=server.inference_url).error["code"] == "InvalidKeyException"
    assert classify_grpc(clips[0], address=server.grpc_inference).error["code"] == "permission_denied"
    assert requests.get(f"{server.management_url}/models/vivit").status_code == 400


def test_a_models_own_card_is_shown_by_describe(server):
    described = manage(server, "GET", "/models/vivit", customized="true").json()[0]
    card = described["customizedMetadata"]
    assert card["labels"] == [f"LABEL_{index}" for index in range(9)]
    assert (described["batchSize"], described["maxBatchDelay"], described["responseTimeout"]) == (8, 5, 300)


def test_a_model_is_registered_scaled_described_and_unregistered_over_rest(server, clips):
    assert manage(server, "POST", "/models", url="other.mar", initial_workers=1, synchronous="true").ok
    assert "predictions" in post(server, clips[0].read_bytes(), model="other").json()
    assert manage(server, "PUT", "/models/other", min_worker=2, max_worker=2, synchronous="true").ok
    described = manage(server, "GET", "/models/other").json()[0]
    assert [worker["status"] for worker in described["workers"]] == ["READY", "READY"]
    assert manage(server, "DELETE", "/models/other/2.0").ok
    assert post(server, clips[0].read_bytes(), model="other").status_code == 404


def test_a_model_is_registered_scaled_described_and_unregistered_over_grpc(server, clips):
    messages, services = load_proto("management.proto")
    metadata = authorization(server, "management")
    with open_channel(server.grpc_management) as channel:
        api = services.ManagementAPIsServiceStub(channel)
        api.RegisterModel(
            messages.RegisterModelRequest(url="other.mar", initial_workers=1, synchronous=True), metadata=metadata
        )
        assert "predictions" in over_grpc(server, clips[0], model="other")
        api.ScaleWorker(
            messages.ScaleWorkerRequest(model_name="other", min_worker=2, max_worker=2, synchronous=True),
            metadata=metadata,
        )
        described = api.DescribeModel(messages.DescribeModelRequest(model_name="other"), metadata=metadata)
        assert len(json.loads(described.msg)[0]["workers"]) == 2
        listed = json.loads(api.ListModels(messages.ListModelsRequest(limit=100), metadata=metadata).msg)
        assert {model["modelName"] for model in listed["models"]} == {"vivit", "other"}
        api.UnregisterModel(messages.UnregisterModelRequest(model_name="other"), metadata=metadata)
    assert "error" in over_grpc(server, clips[0], model="other")


def test_metrics_are_there_for_prometheus(server, clips, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("hello")
    rest(server, clips[0])
    rest(server, text)
    samples = requests.get(f"{server.metrics_url}/metrics", headers=server.headers("management")).text
    assert re.search(r'vivit_rejected_requests_total{Code="not_a_video",ModelName="vivit",[^}]*} [1-9]', samples)
    for name in (
        "vivit_decode_seconds_bucket",
        "vivit_inference_seconds_sum",
        "vivit_batch_clips_count",
        "vivit_clips_total",
    ):
        assert re.search(rf'^{name}{{[^}}]*ModelName="vivit"[^}}]*}} [\d.E]+', samples, re.MULTILINE), name


def test_ping_says_healthy(server):
    assert requests.get(f"{server.inference_url}/ping", headers=server.headers("inference")).json() == {
        "status": "Healthy"
    }
    _, services = load_proto("inference.proto")
    with open_channel(server.grpc_inference) as channel:
        answer = services.InferenceAPIsServiceStub(channel).Ping(empty_pb2.Empty(), metadata=authorization(server))
    assert json.loads(answer.health) == {"status": "Healthy"}


def authorization(server, kind="inference"):
    return [(key.lower(), value) for key, value in server.headers(kind).items()]


def test_the_client_prints_a_line_a_video_and_fails_if_one_failed(server, clips, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("hello")
    done = client(server, *clips, text, "--url", server.inference_url)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [clip.name for clip in clips] + ["text.mp4"]
    assert "LABEL_" in lines[0] and "not_a_video" in lines[4]


def test_the_client_prints_json_for_programs(server, clips):
    done = client(server, *clips, "--grpc", server.grpc_inference, "--top-k", "1", "--json")
    assert done.returncode == 0
    answers = json.loads(done.stdout)
    assert [answer["file"] for answer in answers] == [str(clip) for clip in clips]
    assert all(len(answer["predictions"]) == 1 for answer in answers)


def test_the_client_says_when_nobody_listens(clips):
    assert classify_rest(clips[0], url="http://127.0.0.1:9").error["code"] == "no_answer"
    assert classify_grpc(clips[0], address="127.0.0.1:9", timeout_s=5).error["code"] == "unavailable"


def client(server, *arguments):
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "classify.py"),
            *map(str, arguments),
            f"--token={server.token('inference')}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_models_cannot_be_registered_unless_the_operator_allows_it(server, checkpoint, tmp_path):
    store = tmp_path / "store"
    build_archive(checkpoint=str(checkpoint), name="vivit", version="1.0", export_path=store)
    config = write_properties(
        tmp_path / "config.properties", on_free_ports(read_properties(ROOT / "config.properties"))
    )
    with Server(config=config, model_store=store, directory=tmp_path / "run") as closed:
        closed.wait_until_ready("vivit")
        assert manage(closed, "POST", "/models", url="vivit.mar").status_code == 405
        assert manage(closed, "DELETE", "/models/vivit").status_code == 405
        assert manage(closed, "GET", "/models/vivit").ok
        pids = [closed.process.pid, *(worker.pid for worker in closed.workers())]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
