"""What TorchServe promises whoever operates it, held against real servers under load: versions, scaling, tokens,
limits, crashes, overload, bad connections, metrics, restarts.

A process is stopped (SIGSTOP) where something must happen while it is surely at work, so that no test depends on
timing.
"""

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
import requests
import yaml
from google.protobuf import empty_pb2

from handler.cli.build import build_archive
from handler.cli.client import load_proto, open_channel
from handler.cli.server import Server, on_free_ports, read_properties, with_model_settings, write_properties
from stress.fuzz import ask_grpc, ask_rest, is_same_answer
from tests.server.test_server import authorization, manage
from tests.support.clips import numbered_frames, write_clip

ROOT = Path(__file__).resolve().parents[2]
BATCH_SIZE = 8
ANSWER_S = 120  # an answer that takes longer is taken for one that never comes
SETTLE_S = 30  # for what follows soon: processes that end, connections that are closed
REQUEST_BYTES = 21_000_000
QUEUE_SIZE = 8


@pytest.fixture(scope="module")
def store(checkpoint, tmp_path_factory):
    """vivit.mar, version 1.0 with labels LABEL_n, and vivit-2.0.mar, the same with labels NEW_n."""
    folder = tmp_path_factory.mktemp("archives")
    store = folder / "store"
    labels = folder / "labels.txt"
    labels.write_text("".join(f"NEW_{index}\n" for index in range(9)))
    build_archive(checkpoint=str(checkpoint), name="vivit", version="1.0", export_path=store)
    archive = build_archive(
        checkpoint=str(checkpoint), name="vivit", version="2.0", export_path=folder / "2.0", labels=str(labels)
    )
    shutil.move(archive, store / "vivit-2.0.mar")
    return store


def settings(**others):
    """config.properties as shipped but for the ports, one worker, and `others`."""
    shipped = with_model_settings(read_properties(ROOT / "config.properties"), minWorkers=1)
    return {**on_free_ports(shipped), **others}


@pytest.fixture(scope="module")
def server(store, tmp_path_factory):
    """As shipped, but models may be registered."""
    folder = tmp_path_factory.mktemp("server")
    config = write_properties(folder / "config.properties", settings(enable_model_api="true"))
    with Server(config=config, model_store=store, directory=folder / "run") as server:
        server.wait_until_ready("vivit")
        yield server


@pytest.fixture(scope="module")
def narrow_server(store, tmp_path_factory):
    """Asks for no token, takes small requests and few of them, and writes its metrics to its logs."""
    folder = tmp_path_factory.mktemp("narrow")
    config = write_properties(
        folder / "config.properties",
        settings(
            disable_token_authorization="true",
            max_request_size=str(REQUEST_BYTES),
            job_queue_size=str(QUEUE_SIZE),
            metrics_mode="log",
        ),
    )
    with Server(config=config, model_store=store, directory=folder / "run") as server:
        server.wait_until_ready("vivit")
        yield server


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", numbered_frames(30, seed=1)).read_bytes()


@pytest.fixture(scope="module")
def expected(server, clip):
    """What the clip is answered alone."""
    return ask_rest(server, clip)[1]


def wait_for(condition, *, timeout_s=SETTLE_S):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def described(server, path="/models/vivit"):
    return manage(server, "GET", path).json()[0]


def ready_pids(server, path="/models/vivit"):
    return {worker["pid"] for worker in described(server, path)["workers"] if worker["status"] == "READY"}


def waiting(server):
    """Requests that no worker has taken yet."""
    return described(server)["jobQueueStatus"]["pendingRequests"]


@contextlib.contextmanager
def stopped(processes):
    """Lets processes do nothing while the block runs."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


@contextlib.contextmanager
def sent(server, data, *, count):
    """`count` requests at the same time; yields their futures, which give (status, answer)."""
    with ThreadPoolExecutor(count) as pool:
        yield [pool.submit(ask_rest, server, data) for _ in range(count)]


def answers_of(futures):
    return [future.result(timeout=ANSWER_S) for future in futures]


def taken_apart(answers, expected):
    """(how many are right, the others)."""
    right = [answer for status, answer in answers if status == 200 and is_same_answer(answer, expected)]
    return len(right), [each for each in answers if each[1] not in right]


@contextlib.contextmanager
def load(server, data, *, clients=4):
    """Clients that ask again and again while the block runs; yields the list that their answers are added to."""
    answers, done = [], threading.Event()

    def client():
        while not done.is_set():
            answers.append(ask_rest(server, data))

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(client) for _ in range(clients)]
        try:
            wait_for(lambda: len(answers) >= clients)
            yield answers
        finally:
            done.set()
        for each in asking:
            each.result(timeout=ANSWER_S)


def next_answers(answers, count=8):
    """The next answers that come from now on, those that are under way already left out."""
    start = len(answers) + 8
    wait_for(lambda: len(answers) >= start + count)
    return answers[start : start + count]


def labels_of(answers):
    """The first part of the labels in the answers, each of which must be a good one."""
    assert all(status == 200 for status, _ in answers), answers
    return {answer["predictions"][0]["label"].split("_")[0] for _, answer in answers}


def register(server, archive, *, workers=1):
    answer = manage(
        server,
        "POST",
        "/models",
        url=archive,
        initial_workers=workers,
        batch_size=BATCH_SIZE,
        max_batch_delay=5,
        synchronous="true",
    )
    assert answer.ok, answer.text


def scale(server, workers):
    for _ in range(3):
        answer = manage(server, "PUT", "/models/vivit", min_worker=workers, max_worker=workers, synchronous="true")
        if "ConcurrentModificationException" not in answer.text:
            break  # else TorchServe has tripped over itself, as it may while workers are busy: ask again
    assert answer.ok, answer.text


# --- versions and workers


@pytest.fixture
def second_version(server):
    """Version 2.0 beside 1.0, which is the default one before and after."""
    register(server, "vivit-2.0.mar")
    yield "2.0"
    if "1.0" not in {model["modelVersion"] for model in manage(server, "GET", "/models/vivit/all").json()}:
        register(server, "vivit.mar")
    assert manage(server, "PUT", "/models/vivit/1.0/set-default").ok
    assert manage(server, "DELETE", "/models/vivit/2.0").ok


def test_versions_stand_side_by_side_and_the_default_is_switched_while_requests_flow(server, clip, second_version):
    def ask_version(version):
        answer = requests.post(
            f"{server.inference_url}/predictions/vivit/{version}",
            data=clip,
            timeout=ANSWER_S,
            headers={"Content-Type": "application/octet-stream", **server.headers("inference")},
        )
        return answer.status_code, answer.json()

    with load(server, clip) as answers:
        assert labels_of([ask_version("1.0")]) == {"LABEL"}
        assert labels_of([ask_version("2.0")]) == {"NEW"}
        assert labels_of(next_answers(answers)) == {"LABEL"}
        assert manage(server, "PUT", "/models/vivit/2.0/set-default").ok
        assert labels_of(next_answers(answers)) == {"NEW"}
        assert manage(server, "PUT", "/models/vivit/1.0/set-default").ok
        assert labels_of(next_answers(answers)) == {"LABEL"}
    assert labels_of(answers) == {"LABEL", "NEW"}


def test_versions_are_registered_described_and_switched_over_grpc(server, clip):
    messages, services = load_proto("management.proto")
    metadata = authorization(server, "management")
    with open_channel(server.grpc_management) as channel:
        api = services.ManagementAPIsServiceStub(channel)
        api.RegisterModel(
            messages.RegisterModelRequest(url="vivit-2.0.mar", initial_workers=1, synchronous=True), metadata=metadata
        )
        asked = messages.DescribeModelRequest(model_name="vivit", model_version="2.0", customized=True)
        (shown,) = json.loads(api.DescribeModel(asked, metadata=metadata).msg)
        assert shown["modelVersion"] == "2.0"
        assert shown["customizedMetadata"]["labels"][0] == "NEW_0"
        for version, label in (("2.0", "NEW"), ("1.0", "LABEL")):
            api.SetDefault(messages.SetDefaultRequest(model_name="vivit", model_version=version), metadata=metadata)
            assert labels_of([(200, ask_grpc(server, clip)[1])]) == {label}
        gone = messages.UnregisterModelRequest(model_name="vivit", model_version="2.0")
        api.UnregisterModel(gone, metadata=metadata)
        with pytest.raises(grpc.RpcError) as refusal:
            api.DescribeModel(asked, metadata=metadata)
    assert "ModelVersionNotFoundException" in refusal.value.details()


def test_workers_are_added_under_load_without_a_failed_request(server, clip, expected):
    with load(server, clip) as answers:
        scale(server, 3)
        next_answers(answers)
    assert len(ready_pids(server)) == 3
    assert taken_apart(answers, expected) == (len(answers), [])
    scale(server, 1)


def test_workers_that_are_taken_away_cost_only_what_they_were_busy_with(server, clip, expected):
    scale(server, 3)
    workers = server.workers()
    with stopped(workers), sent(server, clip, count=4 * BATCH_SIZE) as futures:
        wait_for(lambda: waiting(server) >= BATCH_SIZE)  # so each worker has taken as many
        scale(server, 1)
        (left,) = [worker for worker in workers if worker.pid in ready_pids(server)]
        left.resume()
        answers = answers_of(futures)
    right, others = taken_apart(answers, expected)
    # TorchServe gives some of those to the worker that is left, and some an error.
    assert right >= 2 * BATCH_SIZE
    assert all(status == 500 and answer["message"] == "Worker died." for status, answer in others)
    assert ready_pids(server) == {left.pid}


@pytest.mark.parametrize("address", ["--url", "--grpc"])
def test_the_client_asks_again_what_a_worker_was_busy_with_that_is_taken_away(server, clip, tmp_path, address):
    videos = [tmp_path / f"{number}.mp4" for number in range(4 * BATCH_SIZE)]
    for video in videos:
        video.write_bytes(clip)
    scale(server, 3)
    workers = server.workers()
    with stopped(workers):
        client = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "scripts" / "classify.py"),
                *map(str, videos),
                "--jobs",
                str(len(videos)),
                address,
                server.inference_url if address == "--url" else server.grpc_inference,
                f"--token={server.token('inference')}",
                "--json",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: waiting(server) >= BATCH_SIZE)  # so each worker has taken as many
        scale(server, 1)
    output, _ = client.communicate(timeout=ANSWER_S)
    assert client.returncode == 0, output
    assert all(answer["predictions"] for answer in json.loads(output))


def test_fewer_workers_without_a_failed_request_are_had_by_way_of_another_version(
    server, clip, expected, second_version
):
    scale(server, 3)
    with load(server, clip) as answers:
        assert manage(server, "PUT", "/models/vivit/2.0/set-default").ok
        assert labels_of(next_answers(answers)) == {"NEW"}  # so nobody waits for version 1.0 any more
        assert manage(server, "DELETE", "/models/vivit/1.0").ok
        assert labels_of(next_answers(answers)) == {"NEW"}
    assert labels_of(answers) == {"LABEL", "NEW"}
    assert len(server.workers()) == 1


def test_an_archive_comes_from_the_model_store_only(server, tmp_path, store):
    shutil.copy(store / "vivit-2.0.mar", tmp_path / "else.mar")
    elsewhere = tmp_path / "else.mar"
    for url in ("http://127.0.0.1:9/else.mar", f"file://{elsewhere}", "../else.mar", str(elsewhere)):
        assert not manage(server, "POST", "/models", url=url).ok, url
    assert [model["modelName"] for model in manage(server, "GET", "/models").json()["models"]] == ["vivit"]


# --- tokens


def test_a_token_opens_its_own_api_only(server, clip):
    own, other = server.headers("inference"), server.headers("management")
    wrong = {"Authorization": "Bearer nonsense"}
    for headers in ({}, other, wrong):
        answer = requests.post(f"{server.inference_url}/predictions/vivit", data=clip, headers=headers)
        assert (answer.status_code, answer.json()["type"]) == (400, "InvalidKeyException")
    for headers in ({}, own, wrong):
        answer = requests.get(f"{server.management_url}/models", headers=headers)
        assert (answer.status_code, answer.json()["type"]) == (400, "InvalidKeyException")


def test_a_token_opens_its_own_api_only_over_grpc(server):
    _, inference = load_proto("inference.proto")
    messages, management = load_proto("management.proto")
    with open_channel(server.grpc_inference) as one, open_channel(server.grpc_management) as other:
        calls = {
            "management": lambda metadata: inference.InferenceAPIsServiceStub(one).Ping(
                empty_pb2.Empty(), metadata=metadata
            ),
            "inference": lambda metadata: management.ManagementAPIsServiceStub(other).ListModels(
                messages.ListModelsRequest(), metadata=metadata
            ),
        }
        for wrong, call in calls.items():
            for metadata in ([], authorization(server, wrong), [("authorization", "Bearer nonsense")]):
                with pytest.raises(grpc.RpcError) as refusal:
                    call(metadata)
                assert refusal.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_the_api_key_draws_a_new_token_and_the_old_one_is_refused(server, clip):
    old = server.headers("inference")
    drawn = requests.get(f"{server.management_url}/token", params={"type": "inference"}, headers=server.headers("API"))
    assert drawn.ok, drawn.text
    assert server.headers("inference") != old
    assert ask_rest(server, clip)[0] == 200
    assert requests.get(f"{server.inference_url}/ping", headers=old).status_code == 400


def test_without_authorization_nobody_needs_a_token(narrow_server, clip):
    assert narrow_server.headers("inference") == {}
    assert ask_rest(narrow_server, clip)[0] == 200
    assert "predictions" in ask_grpc(narrow_server, clip)[1]
    assert manage(narrow_server, "GET", "/models/vivit").ok


# --- large requests


@pytest.fixture(scope="module")
def large_video(tmp_path_factory):
    """Nearly as large as the narrow server takes: uncompressed pictures."""
    frames = numbered_frames(68, height=288, width=352)
    path = write_clip(tmp_path_factory.mktemp("large") / "large.avi", frames, codec="rawvideo", pix_fmt="bgr24")
    data = path.read_bytes()
    assert REQUEST_BYTES - 500_000 < len(data) < REQUEST_BYTES - 1000
    return data


@pytest.mark.parametrize("ask", [ask_rest, ask_grpc], ids=["REST", "gRPC"])
def test_a_video_just_below_the_limit_is_served_and_one_just_above_it_is_refused(narrow_server, large_video, ask):
    assert "predictions" in ask(narrow_server, large_video)[1]
    too_large = large_video + bytes(REQUEST_BYTES + 1 - len(large_video))
    if ask is ask_rest:
        assert ask(narrow_server, too_large)[0] == 413
    else:
        with pytest.raises(grpc.RpcError) as refusal:
            ask(narrow_server, too_large)
        assert refusal.value.code() == grpc.StatusCode.CANCELLED  # TorchServe resets the stream
    assert "predictions" in ask(narrow_server, large_video)[1]


def test_a_grpc_client_that_limits_its_own_messages_is_told_so_before_anything_is_sent(narrow_server, large_video):
    messages, services = load_proto("inference.proto")
    limited = [("grpc.max_send_message_length", 4_000_000)]
    with grpc.insecure_channel(narrow_server.grpc_inference, options=limited) as channel:
        with pytest.raises(grpc.RpcError) as refusal:
            services.InferenceAPIsServiceStub(channel).Predictions(
                messages.PredictionsRequest(model_name="vivit", input={"data": large_video})
            )
    assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


# --- processes that die


def test_a_killed_worker_costs_only_what_it_was_busy_with_and_comes_back(server, clip, expected):
    (worker,) = server.workers()
    decoders = worker.children()
    with stopped([worker]), sent(server, clip, count=3 * BATCH_SIZE) as futures:
        wait_for(lambda: waiting(server) >= 2 * BATCH_SIZE)  # so the worker has taken the others
        worker.kill()
        answers = answers_of(futures)
    right, others = taken_apart(answers, expected)
    assert right >= 2 * BATCH_SIZE and 1 <= len(others) <= BATCH_SIZE
    assert all(status in (500, 507) and answer["message"] == "Worker died." for status, answer in others)
    wait_for(lambda: len(ready_pids(server)) == 1)
    assert ready_pids(server) != {worker.pid}
    assert decoders and not psutil.wait_procs(decoders, timeout=SETTLE_S)[1]


def test_a_killed_decoder_costs_only_the_file_that_it_was_busy_with(server, clip, expected):
    (worker,) = server.workers()
    decoder, *others = worker.children()
    with stopped([decoder]), sent(server, clip, count=2 * BATCH_SIZE) as futures:
        wait_for(lambda: unread_bytes(decoder) > 0)
        decoder.kill()
        answers = answers_of(futures)
    right, refused = taken_apart(answers, expected)
    assert right == 2 * BATCH_SIZE - 1
    assert [(status, answer["error"]["code"]) for status, answer in refused] == [(422, "decoder_crash")]
    assert [each.pid for each in server.workers()] == [worker.pid]
    left = worker.children()
    assert decoder not in left and set(others) <= set(left) and len(left) == len(others) + 1


def unread_bytes(process):
    """How much waits in the pipe that is a process's standard input."""
    with open(f"/proc/{process.pid}/fd/0", "rb", buffering=0) as pipe:
        return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


# --- overload and bad connections


def test_what_the_queue_has_no_room_for_is_refused_at_once_and_the_rest_is_served(narrow_server, clip):
    expected = ask_rest(narrow_server, clip)[1]
    (worker,) = narrow_server.workers()
    with stopped([worker]), sent(narrow_server, clip, count=40) as futures:
        # The worker does nothing: these come from nobody who waits for it.
        wait_for(lambda: sum(future.done() for future in futures) >= 40 - BATCH_SIZE - QUEUE_SIZE)
        refused = answers_of(future for future in futures if future.done())
        assert waiting(narrow_server) == QUEUE_SIZE
        worker.resume()
        answers = answers_of(futures)
    assert all((status, answer["type"]) == (503, "ServiceUnavailableException") for status, answer in refused)
    right, others = taken_apart(answers, expected)
    assert right >= QUEUE_SIZE + 1 and len(others) == len(refused)
    assert taken_apart([ask_rest(narrow_server, clip)], expected) == (1, [])
    assert narrow_server.workers() == [worker]


def test_a_full_queue_is_told_over_grpc(narrow_server, clip):
    (worker,) = narrow_server.workers()
    with stopped([worker]), sent(narrow_server, clip, count=40) as futures:
        wait_for(lambda: sum(future.done() for future in futures) >= 40 - BATCH_SIZE - QUEUE_SIZE)
        with pytest.raises(grpc.RpcError) as refusal:
            ask_grpc(narrow_server, clip)
        worker.resume()
        answers_of(futures)
    assert refusal.value.code() == grpc.StatusCode.INTERNAL
    assert "has no worker to serve inference request" in refusal.value.details()  # TorchServe's words for it


@contextlib.contextmanager
def half_an_upload(server, data):
    """A connection on which the first half of a request's body has been sent."""
    host, port = server.inference_url.removeprefix("http://").split(":")
    (authorization,) = server.headers("inference").values()
    with socket.create_connection((host, int(port)), timeout=ANSWER_S) as connection:
        connection.sendall(
            (
                f"POST /predictions/vivit HTTP/1.1\r\nHost: {host}\r\nAuthorization: {authorization}\r\n"
                f"Content-Type: application/octet-stream\r\nContent-Length: {len(data)}\r\n\r\n"
            ).encode()
            + data[: len(data) // 2]
        )
        yield connection


def test_clients_that_hang_up_while_they_upload_leave_nothing_behind(server, clip, expected):
    before = server.process.num_fds(), len(temporary_files(server))
    for _ in range(20):
        with half_an_upload(server, clip):
            pass
    assert taken_apart([ask_rest(server, clip)], expected) == (1, [])
    wait_for(lambda: server.process.num_fds() <= before[0])
    assert len(temporary_files(server)) <= before[1]


def test_clients_that_hang_up_before_their_answer_cost_nobody_else_anything(server, clip, expected):
    (worker,) = server.workers()
    with stopped([worker]), sent(server, clip, count=4) as futures:
        for _ in range(4):
            with half_an_upload(server, clip) as connection:
                connection.sendall(clip[len(clip) // 2 :])
        worker.resume()
        answers = answers_of(futures)
    assert taken_apart(answers, expected) == (4, [])
    assert server.workers() == [worker]


def test_a_client_that_uploads_slowly_keeps_nobody_waiting_and_gets_its_answer(server, clip, expected):
    with half_an_upload(server, clip) as connection:
        with load(server, clip) as answers:
            next_answers(answers)
        assert taken_apart(answers, expected) == (len(answers), [])
        for byte in clip[len(clip) // 2 : -1000]:
            connection.sendall(bytes([byte]))
        connection.sendall(clip[-1000:])
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert taken_apart([(response.status, json.loads(response.read()))], expected) == (1, [])


def temporary_files(server):
    return [path for path in Path(server.temporary).rglob("*") if path.is_file()]


# --- metrics


def test_in_log_mode_the_same_metrics_are_in_the_logs(narrow_server, clip):
    ask_rest(narrow_server, clip)
    ask_rest(narrow_server, b"hello")
    metrics = yaml.safe_load((ROOT / "handler" / "assets" / "metrics.yaml").read_text())["model_metrics"]
    names = {metric["name"] for kind in metrics.values() for metric in kind}
    log = narrow_server.directory / "logs" / "model_metrics.log"
    wait_for(lambda: names <= {line.split(" - ")[-1].split(".")[0] for line in log.read_text().splitlines()})
    assert "vivit_rejected_requests_total.Count:1.0|#Code:not_a_video,ModelName:vivit" in log.read_text()


# --- stop and start again


def family(server):
    return [server.process, *server.workers(), *server.decoders()]


def test_a_stopped_server_comes_back_with_the_same_models_and_workers_and_leaves_no_process_behind(
    store, clip, tmp_path
):
    config = write_properties(tmp_path / "config.properties", settings(enable_model_api="true"))
    places = {"model_store": store, "directory": tmp_path / "run", "keeps_snapshots": True}
    with Server(config=config, **places) as server:
        server.wait_until_ready("vivit")
        register(server, "vivit-2.0.mar")
        scale(server, 2)
        assert manage(server, "PUT", "/models/vivit/2.0/set-default").ok
        before = [standing(server, version) for version in ("1.0", "2.0")]
        processes = family(server)
        done = subprocess.run(
            [sys.executable, "-m", "ts.model_server", "--stop"],
            env={**os.environ, "TMPDIR": server.temporary},
            cwd=server.directory,
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
        )
        assert "TorchServe has stopped." in done.stdout, done
        assert len(processes) > 6 and not psutil.wait_procs(processes, timeout=SETTLE_S)[1]
    newest = max((server.directory / "logs" / "config").glob("*.cfg"))
    with Server(config=newest, **places) as server:
        server.wait_until_ready("vivit")
        assert [standing(server, version) for version in ("1.0", "2.0")] == before
        assert labels_of([ask_rest(server, clip)]) == {"NEW"}
        processes = family(server)
        server.process.kill()
        assert not psutil.wait_procs(processes, timeout=SETTLE_S)[1]


def standing(server, version):
    """What must be the same after a restart."""
    path = f"/models/vivit/{version}"
    wait_for(lambda: len(ready_pids(server, path)) == described(server, path)["minWorkers"])
    model = described(server, path)
    kept = ("modelName", "modelVersion", "minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout")
    return {key: model[key] for key in kept} | {"workers": len(model["workers"])}
