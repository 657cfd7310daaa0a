"""Operating a real TorchServe: versions, scaling, crashes, overload, bad connections, limits, logs and restarts."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import grpc
import psutil
import pytest
import yaml

from handler.cli.client import authorization, read_answer, with_retries
from stress.server import is_same_answer
from tests.support.clips import numbered_frames, write_clip
from tests.support.server import (
    ANSWER_TIMEOUT_S,
    BATCH_SIZE,
    ROOT,
    SETTLE_TIMEOUT_S,
    ServerUnderTest,
    in_flight,
    label_prefixes,
    load,
    next_answers,
    others,
    results,
    running_server,
    settings,
    wait_for,
)

REQUEST_BYTES = 7_620_000  # above the defaults of TorchServe, 6.5 MB, and gRPC, 4 MB
QUEUE_SIZE = 32


@pytest.fixture(scope="module")
def small_server(store, tmp_path_factory):
    """No tokens, no model registration, small limits, metrics in the log.

    Tests may scale it and kill its processes; they leave one worker.
    """
    changes = {
        "disable_token_authorization": "true",
        "max_request_size": str(REQUEST_BYTES),
        "job_queue_size": str(QUEUE_SIZE),
        "metrics_mode": "log",
    }
    with running_server(tmp_path_factory.mktemp("small"), store=store, **changes) as server:
        yield server


# Versions


@pytest.fixture
def second_version(server):
    """Registers version 2.0; afterwards 1.0 is the only version again."""
    server.register("vivit-2.0.mar")
    yield
    if "1.0" not in {model["modelVersion"] for model in server.manage("GET", "/models/vivit/all").json()}:
        server.register("vivit.mar")
    assert server.manage("PUT", "/models/vivit/1.0/set-default").ok
    assert server.manage("DELETE", "/models/vivit/2.0").ok


def test_versions_switch_under_load(server, video, second_version):
    """Switching the default version and unregistering the old one fails no request."""
    assert label_prefixes([server.rest(video, model="vivit/1.0")]) == {"LABEL"}
    assert label_prefixes([server.rest(video, model="vivit/2.0")]) == {"NEW"}
    with load(server, video) as answers:
        assert label_prefixes(next_answers(answers)) == {"LABEL"}
        assert server.manage("PUT", "/models/vivit/2.0/set-default").ok
        assert label_prefixes(next_answers(answers)) == {"NEW"}  # so no request waits for version 1.0
        assert server.manage("DELETE", "/models/vivit/1.0").ok
        assert label_prefixes(next_answers(answers)) == {"NEW"}
    assert label_prefixes(answers) == {"LABEL", "NEW"}
    assert len(server.workers()) == 1


@pytest.fixture
def other_model(server):
    """Removes the model "other" if a test has left it."""
    yield "other"
    if "other" in {model["modelName"] for model in server.manage("GET", "/models").json()["models"]}:
        server.manage("DELETE", "/models/other")


def test_grpc_management(server, video, other_model):
    with server.management_stub() as (stub, messages, metadata):

        def call(method, **fields):
            """Calls e.g. RegisterModel with a RegisterModelRequest of these fields."""
            request = getattr(messages, f"{method}Request")(**fields)
            return getattr(stub, method)(request, metadata=metadata).msg

        def describe():
            message = call("DescribeModel", model_name=other_model, model_version="2.0", customized=True)
            return json.loads(message)[0]

        call(
            "RegisterModel",
            url="vivit-2.0.mar",
            model_name=other_model,
            initial_workers=1,
            batch_size=4,
            synchronous=True,
        )
        assert label_prefixes([server.grpc(video, model=other_model), server.rest(video, model=other_model)]) == {"NEW"}
        assert (describe()["modelVersion"], describe()["batchSize"]) == ("2.0", 4)
        assert describe()["customizedMetadata"]["labels"][0] == "NEW_0"
        models = json.loads(call("ListModels", limit=100))["models"]
        assert {model["modelName"] for model in models} == {"vivit", other_model}
        call("SetDefault", model_name=other_model, model_version="2.0")
        call("ScaleWorker", model_name=other_model, min_worker=1, max_worker=3, synchronous=True)
        assert (describe()["minWorkers"], describe()["maxWorkers"]) == (1, 3)
        call("UnregisterModel", model_name=other_model)
        with pytest.raises(grpc.RpcError) as caught:
            describe()
    assert "ModelNotFoundException" in caught.value.details()
    assert server.rest(video, model=other_model).status == 404
    assert server.grpc(video, model=other_model).error is not None


def test_archives_only_from_model_store(server, store, tmp_path):
    elsewhere = tmp_path / "elsewhere.mar"
    shutil.copy(store / "vivit-2.0.mar", elsewhere)
    for url in ("http://127.0.0.1:9/elsewhere.mar", f"file://{elsewhere}", "../elsewhere.mar", str(elsewhere)):
        assert not server.manage("POST", "/models", url=url, model_name="elsewhere").ok, url
    assert [model["modelName"] for model in server.manage("GET", "/models").json()["models"]] == ["vivit"]


def test_registration_off_by_default(small_server):
    assert small_server.manage("POST", "/models", url="vivit-2.0.mar").status_code == 405
    assert small_server.manage("DELETE", "/models/vivit").status_code == 405
    assert small_server.manage("GET", "/models/vivit").ok
    # Workflows register models too, whatever `enable_model_api` is: their store must have no files.
    answer = small_server.manage("POST", "/workflows", url="vivit.mar")
    assert "not found in workflow store" in answer.json()["message"]


def test_authorization_off(small_server, video, expected):
    assert small_server.token("inference") is None
    assert is_same_answer(small_server.rest(video), expected)
    assert is_same_answer(small_server.grpc(video), expected)


# Scaling and crashes. Suspended processes keep requests in flight.


def test_scale_up_under_load(small_server, video, expected):
    with load(small_server, video) as answers:
        small_server.scale(2)
        next_answers(answers)
    assert len(small_server.ready_pids()) == 2
    assert others(answers, expected) == []
    small_server.scale(1)


def test_scale_down_under_load(small_server, video, expected):
    """Requests of removed workers fail or move to the remaining worker; all others are answered."""
    small_server.scale(3)
    workers = small_server.workers()
    with in_flight(partial(small_server.rest, video), count=4 * BATCH_SIZE, suspend=workers) as futures:
        wait_for(lambda: small_server.pending_requests() >= BATCH_SIZE)  # so every worker has taken some
        small_server.scale(1)
        (left,) = [worker for worker in workers if worker.pid in small_server.ready_pids()]
        left.resume()
        answers = results(futures)
    failures = others(answers, expected)
    assert len(failures) <= 2 * BATCH_SIZE
    assert all(answer.status == 500 and "Worker died." in answer.error["message"] for answer in failures)
    assert small_server.ready_pids() == {left.pid}


def test_killed_worker(small_server, video, expected):
    """Only the killed worker's batch fails, TorchServe starts another worker, and the client's retries succeed."""
    first_answers = []

    def ask_with_retries(ask):
        answers = []

        def ask_once():
            answers.append(ask(video))
            return answers[-1]

        final = with_retries(ask_once, retries=5)
        first_answers.append(answers[0])
        return final

    (worker,) = small_server.workers()
    decoders = worker.children()
    asks = partial(ask_with_retries, small_server.rest), partial(ask_with_retries, small_server.grpc)
    with in_flight(*asks, count=3 * BATCH_SIZE, suspend=[worker]) as futures:
        wait_for(lambda: small_server.pending_requests() >= 2 * BATCH_SIZE)
        worker.kill()
        answers = results(futures)
    assert others(answers, expected) == []
    failures = others(first_answers, expected)
    assert 1 <= len(failures) <= BATCH_SIZE
    assert all(answer.status in (500, 507, None) for answer in failures)
    assert all("Worker died." in answer.error["message"] for answer in failures)
    wait_for(lambda: len(small_server.ready_pids()) == 1)
    assert small_server.ready_pids() != {worker.pid}
    assert decoders and not psutil.wait_procs(decoders, timeout=SETTLE_TIMEOUT_S)[1]


def test_killed_decoders(small_server, video, expected):
    """The worker starts other decoders, which decode the videos again."""
    (worker,) = small_server.workers()
    decoders = worker.children()
    with in_flight(partial(small_server.rest, video), count=2 * BATCH_SIZE, suspend=decoders) as futures:
        wait_for(lambda: small_server.pending_requests() >= BATCH_SIZE)  # so the worker has taken some
        wait_until_idle(worker)  # so the decoders have received videos
        for decoder in decoders:
            decoder.kill()
        answers = results(futures)
    assert others(answers, expected) == []
    assert small_server.workers() == [worker]
    assert len(worker.children()) == len(decoders) and not set(decoders) & set(worker.children())


def wait_until_idle(process):
    switches = [-1]

    def is_idle():
        switches.append(process.num_ctx_switches())
        return switches[-1] == switches[-2]

    wait_for(is_idle)


# Overload, limits and bad connections


def test_full_queue(small_server, video, expected):
    """Requests beyond the queue's size fail immediately; those in the queue are answered."""
    (worker,) = small_server.workers()
    count, accepted = BATCH_SIZE + QUEUE_SIZE + 16, BATCH_SIZE + QUEUE_SIZE
    with in_flight(partial(small_server.rest, video), count=count, suspend=[worker]) as futures:
        wait_for(lambda: sum(future.done() for future in futures) >= count - accepted)
        rejected = results(future for future in futures if future.done())
        assert small_server.pending_requests() == QUEUE_SIZE
        over_grpc = small_server.grpc(video)
        worker.resume()
        answers = results(futures)
    failures = others(answers, expected)
    assert len(rejected) <= len(failures) <= count - QUEUE_SIZE
    assert all((answer.status, answer.error["code"]) == (503, "ServiceUnavailableException") for answer in failures)
    assert over_grpc.error["code"] == "internal" and over_grpc.is_transient
    assert small_server.workers() == [worker]


@pytest.fixture(scope="module")
def large_video(tmp_path_factory):
    """An uncompressed video a little smaller than the limit."""
    frames = numbered_frames(25, height=288, width=352)
    path = write_clip(tmp_path_factory.mktemp("large") / "large.avi", frames, codec="rawvideo", pix_fmt="bgr24")
    video = path.read_bytes()
    assert REQUEST_BYTES - 20_000 < len(video) < REQUEST_BYTES - 1000
    return video


def test_request_size_limit(small_server, large_video):
    too_large = large_video + bytes(REQUEST_BYTES + 1 - len(large_video))
    assert small_server.rest(large_video).status == 200
    assert small_server.rest(too_large).status == 413
    assert "predictions" in small_server.grpc(large_video).body
    assert small_server.grpc(too_large).error["code"] == "cancelled"  # TorchServe resets the stream
    assert small_server.rest(large_video).status == 200


@contextlib.contextmanager
def half_upload(server, video):
    """Yields a connection on which half of a request's body has been sent."""
    host, port = server.inference_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S) as connection:
        headers = {"Host": host, "Content-Length": len(video), **authorization(server.token("inference"))}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        connection.sendall(f"POST /predictions/vivit HTTP/1.1\r\n{head}\r\n".encode() + video[: len(video) // 2])
        yield connection


def test_aborted_uploads(server, video, expected):
    """Connections that close during an upload leave no descriptors or temporary files."""

    def temporary_files():
        return {path for path in Path(server.temporary).rglob("*") if path.is_file()}

    descriptors, files = server.process.num_fds(), temporary_files()
    for _ in range(20):
        with half_upload(server, video):
            pass
    assert is_same_answer(server.rest(video), expected)
    wait_for(lambda: server.process.num_fds() <= descriptors)
    assert temporary_files() <= files


def test_disconnect_before_response(server, video, expected):
    (worker,) = server.workers()
    with in_flight(partial(server.rest, video), count=4, suspend=[worker]) as futures:
        for _ in range(4):
            with half_upload(server, video) as connection:
                connection.sendall(video[len(video) // 2 :])
        worker.resume()
        assert others(results(futures), expected) == []
    assert server.workers() == [worker]


def test_slow_upload(server, video, expected):
    """A slow upload is answered and delays no other request."""
    with half_upload(server, video) as connection:
        with load(server, video) as answers:
            next_answers(answers)
        assert others(answers, expected) == []
        middle = len(video) // 2
        for byte in video[middle : middle + 500]:
            connection.sendall(bytes([byte]))
        connection.sendall(video[middle + 500 :])
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert is_same_answer(read_answer(response.read(), status=response.status), expected)


def test_metrics_in_log(small_server, video):
    small_server.rest(video)
    small_server.rest(b"hello")
    small_server.rest(video, call="explanations")
    metrics = yaml.safe_load((ROOT / "handler" / "assets" / "metrics.yaml").read_text())["model_metrics"]
    names = {metric["name"] for kind in metrics.values() for metric in kind}
    log = small_server.directory / "logs" / "model_metrics.log"
    wait_for(lambda: names <= {line.split(" - ")[-1].split(".")[0] for line in log.read_text().splitlines()})
    assert "vivit_rejected_requests_total.Count:1.0|#Code:not_a_video,ModelName:vivit" in log.read_text()


# Stopping and restarting


def test_restart_from_snapshot(store, video, tmp_path):
    """A server started with the last snapshot has the same models and workers. Stopped servers leave no processes."""
    places = {"model_store": store, "directory": tmp_path / "run", "keeps_snapshots": True}

    def state(server):
        wait_for(lambda: server.ready_pids("2.0") != set())
        keys = ("modelVersion", "minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout")
        descriptions = [server.describe(version) for version in ("1.0", "2.0", "")]
        return [[each[key] for key in keys] + [len(each["workers"])] for each in descriptions]

    with ServerUnderTest(config=settings(enable_model_api="true", load_models="", models="{}"), **places) as server:
        server.register("vivit.mar", initial_workers=0)
        server.register("vivit-2.0.mar", max_batch_delay=7)
        assert server.manage("PUT", "/models/vivit/2.0/set-default").ok
        before, processes = state(server), server.processes()
        done = subprocess.run(
            [sys.executable, "-m", "ts.model_server", "--stop"],
            env={**os.environ, "TMPDIR": server.temporary},
            cwd=server.directory,
            capture_output=True,
            text=True,
            timeout=ANSWER_TIMEOUT_S,
        )
        assert "TorchServe has stopped." in done.stdout, done
        assert len(processes) > 3 and not psutil.wait_procs(processes, timeout=SETTLE_TIMEOUT_S)[1]
    newest = max((server.directory / "logs" / "config").glob("*.cfg"))
    with ServerUnderTest(config=newest, **places) as server:
        server.wait_until_ready("vivit")
        assert state(server) == before
        assert label_prefixes([server.rest(video)]) == {"NEW"}
        processes = server.processes()
        server.process.kill()
        assert not psutil.wait_procs(processes, timeout=SETTLE_TIMEOUT_S)[1]
