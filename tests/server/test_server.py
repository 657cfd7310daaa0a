"""Classification, model description, tokens, metrics and health checks of a real TorchServe."""

import base64
import json
import re
import subprocess
import sys

import grpc
import pytest
import requests
from google.protobuf import empty_pb2

from handler.cli.client import authorization, authorization_metadata, read_answer
from stress.server import is_same_answer
from tests.server.conftest import MAX_FRAMES
from tests.support.clips import varied_clips
from tests.support.oracle import assert_scores_match_transformers
from tests.support.server import ROOT


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return varied_clips(tmp_path_factory.mktemp("clips"))


def test_scores_match_transformers(server, checkpoint, clips):
    for clip in clips:
        answer = server.rest(clip, parameters={"top_k": 9}).body
        assert_scores_match_transformers(
            {each["label"]: each["score"] for each in answer["predictions"]},
            checkpoint=checkpoint,
            clip=clip,
            times_s=answer["video"]["frame_times_s"],
            fps=answer["video"]["fps"],
        )


def post(server, path, **options):
    response = requests.post(
        f"{server.inference_url}{path}",
        **{"headers": authorization(server.token("inference")), "timeout": 60, **options},
    )
    assert response.headers["Content-Type"].startswith("application/json")
    return read_answer(response.content, status=response.status_code)


def grpc_json(server, video, **parameters):
    return server.grpc(json.dumps({"video": base64.b64encode(video).decode(), **parameters}).encode())


TRANSPORTS = {
    "raw": lambda server, video, **parameters: server.rest(video, parameters=parameters),
    "raw_video_type": lambda server, video, **parameters: server.rest(
        video, parameters=parameters, headers={"Content-Type": "video/mp4"}
    ),
    "raw_text_type": lambda server, video, **parameters: server.rest(
        video, parameters=parameters, headers={"Content-Type": "text/plain"}
    ),
    "multipart": lambda server, video, **parameters: server.rest(video, parameters=parameters, send_as="multipart"),
    "multipart_data": lambda server, video, **parameters: post(
        server, "/predictions/vivit", data=parameters, files={"data": video}
    ),
    "json": lambda server, video, **parameters: server.rest(video, parameters=parameters, send_as="json"),
    "invocations": lambda server, video, **parameters: post(
        server, "/invocations", params={"model_name": "vivit", **parameters}, data=video
    ),
    "grpc": lambda server, video, **parameters: server.grpc(video, parameters=parameters),
    "grpc_json": grpc_json,
    "grpc_stream": lambda server, video, **parameters: server.grpc_stream(video, **parameters),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_transport(server, video, expected, transport):
    """Every transport returns the same answer, and honors top_k."""
    send = TRANSPORTS[transport]
    assert len(expected.body["predictions"]) == 5
    assert is_same_answer(send(server, video), expected)
    two = send(server, video, top_k="2").body["predictions"]
    assert [each["label"] for each in two] == [each["label"] for each in expected.body["predictions"][:2]]


@pytest.mark.parametrize("send_as", ["raw", "multipart", "json"])
def test_explanation(server, video, expected, send_as):
    answer = server.rest(video, call="explanations", send_as=send_as, parameters={"label": "LABEL_3", "top_k": 2})
    explanation = answer.body.pop("explanation")
    assert (answer.status, explanation["label"]) == (200, "LABEL_3")
    assert explanation["grid"] == {"time": 4, "height": 4, "width": 4}
    assert [each["label"] for each in answer.body["predictions"]] == [
        each["label"] for each in expected.body["predictions"][:2]
    ]
    rejected = server.rest(video, call="explanations", send_as=send_as, parameters={"label": "cat"})
    assert (rejected.status, rejected.error["code"]) == (400, "bad_parameter")


def test_client_command(server, clips, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("hello")
    for address in (["--url", server.inference_url], ["--grpc", server.grpc_inference]):
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / "classify.py", *clips, text, *address]
            + [f"--token={server.token('inference')}", "--top-k", "1"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1, done
        lines = {line.split()[0]: line for line in done.stdout.splitlines()}
        assert set(lines) == {*(clip.name for clip in clips), "text.mp4"}
        assert all(lines[clip.name].count("LABEL_") == 1 for clip in clips)
        assert "not_a_video" in lines["text.mp4"]


def test_describe(server):
    description = server.describe(customized="true")
    keys = ("batchSize", "maxBatchDelay", "responseTimeout", "minWorkers")
    assert [description[key] for key in keys] == [8, 1, 120, 1]
    card = description["customizedMetadata"]
    assert card["labels"] == [f"LABEL_{index}" for index in range(9)]
    assert card["options"]["max_frames"] == MAX_FRAMES
    assert {"active", "missing"} == card["sandbox"].keys()


def test_ping(server):
    response = requests.get(f"{server.inference_url}/ping", headers=server.headers("inference"), timeout=60)
    assert response.json() == {"status": "Healthy"}
    with server.inference_stub() as (stub, _, metadata):
        assert json.loads(stub.Ping(empty_pb2.Empty(), metadata=metadata).health) == {"status": "Healthy"}


def test_prometheus_metrics(server, video):
    server.rest(video)
    server.rest(b"hello")
    samples = requests.get(f"{server.metrics_url}/metrics", timeout=60).text.splitlines()
    for name in (
        'vivit_rejected_requests_total{Code="not_a_video"',
        "vivit_decode_seconds_bucket{",
        "vivit_inference_seconds_sum{",
        "vivit_batch_clips_count{",
        "vivit_clips_total{",
    ):
        values = [float(line.split()[-1]) for line in samples if line.startswith(name) and 'ModelName="vivit"' in line]
        assert max(values, default=0) > 0, name


# Token authorization


@pytest.mark.parametrize("key", [None, "nonsense", "management"])
def test_inference_needs_its_token(server, video, key):
    token = server.token(key) if key == "management" else key
    answer = server.rest(video, token=token)
    assert (answer.status, answer.error["code"]) == (400, "InvalidKeyException")
    assert server.grpc(video, token=token).error["code"] == "permission_denied"


@pytest.mark.parametrize("key", [None, "nonsense", "inference"])
def test_management_needs_its_token(server, key):
    token = server.token(key) if key == "inference" else key
    answer = requests.get(f"{server.management_url}/models", headers=authorization(token), timeout=60)
    assert (answer.status_code, answer.json()["type"]) == (400, "InvalidKeyException")
    with server.management_stub() as (stub, messages, _), pytest.raises(grpc.RpcError) as caught:
        stub.ListModels(messages.ListModelsRequest(), metadata=authorization_metadata(token))
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_calls_without_key_as_documented(server):
    """The manual's table lists every call that is answered without a key, of all that TorchServe describes."""
    addresses = {
        "inference": server.inference_url,
        "management": server.management_url,
        "metrics": server.metrics_url,
    }
    manual = (ROOT / "scripts" / "README.md").read_text()
    for name, url in addresses.items():
        answered = set()
        described = requests.options(url, timeout=60).json()["paths"]
        assert described
        described.update({"/": ["options"], "/api-description": ["get"]})  # not in the description of each address
        for path, methods in described.items():
            for method in methods:
                response = requests.request(method, url + path, timeout=60)
                if response.ok:
                    answered.add(f"{method.upper()} {path}")
                elif name != "metrics":
                    assert response.json()["type"] == "InvalidKeyException", (method, path)
        (row,) = re.findall(rf"^\| {name} \| (.+) \|$", manual, re.MULTILINE)
        assert answered == set(re.findall("`([A-Z]+ /.*?)`", row))
    with server.inference_stub() as (stub, _, _), pytest.raises(grpc.RpcError) as caught:
        stub.Ping(empty_pb2.Empty())
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_api_key_replaces_token(server, video):
    old = server.token("inference")
    response = requests.get(
        f"{server.management_url}/token", params={"type": "inference"}, headers=server.headers("API"), timeout=60
    )
    assert response.ok, response.text
    assert server.token("inference") != old
    assert server.rest(video).status == 200
    assert server.rest(video, token=old).status == 400
