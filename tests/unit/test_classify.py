"""The client for REST and gRPC, the search for a key, and the command `vivit classify`, against servers in threads."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from handler.cli import classify, client
from handler.cli.client import classify_grpc, classify_rest, failure, load_proto, read_answer, with_retries
from handler.cli.keys import find_key
from tests.support.web_server import web_server

ROOT = Path(__file__).resolve().parents[2]
CLOSED_ADDRESS = "127.0.0.1:9"
GOOD = {"predictions": [{"label": "walking", "score": 0.5}], "video": {}, "warnings": []}
WORKER_DIED = {"code": 500, "type": "InternalServerException", "message": "Worker died."}


@pytest.fixture(autouse=True)
def no_keys(tmp_path, monkeypatch):
    """Hides the keys of this machine."""
    for name in ("VIVIT_TOKEN", "VIVIT_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server():
    """A server whose `answers` maps a body to (status, answer), GOOD by default; `requests` lists what it received."""

    def respond(request):
        state.requests.append(request)
        answer = state.answers.get(request.body, (200, GOOD))
        status, answer = answer() if callable(answer) else answer
        return status, answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    state = SimpleNamespace(answers={}, requests=[])
    with web_server(respond) as port:
        state.address = f"127.0.0.1:{port}"
        yield state


# The client


@pytest.mark.parametrize("send_as", ["raw", "multipart", "json"])
def test_rest_request(server, send_as):
    answer = classify_rest(
        b"video", url=server.address, model="m/2.0", parameters={"top_k": 3}, send_as=send_as, token="key"
    )
    assert (answer.body, answer.status, answer.error, answer.is_from_handler) == (GOOD, 200, None, True)
    (request,) = server.requests
    assert (request.path, request.headers["Authorization"]) == ("/predictions/m/2.0", "Bearer key")
    content_type = request.headers["Content-Type"]
    if send_as == "raw":
        assert (request.body, content_type) == (b"video", "application/octet-stream")
        assert request.headers["X-Top-K"] == "3"
    elif send_as == "multipart":
        assert content_type.startswith("multipart/form-data")
        assert b'name="video"' in request.body and b'name="top_k"\r\n\r\n3\r\n' in request.body
    else:
        assert content_type == "application/json"
        assert json.loads(request.body) == {"video": base64.b64encode(b"video").decode(), "top_k": 3}


def test_headers_replace_defaults(server, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"from a file")
    classify_rest(path, url=f"http://{server.address}/", headers={"Content-Type": "video/mp4"})
    (request,) = server.requests
    assert (request.path, request.body) == ("/predictions/vivit", b"from a file")
    assert request.headers["Content-Type"] == "video/mp4" and "Authorization" not in request.headers


@pytest.mark.parametrize(
    "body, status, code, message",
    [
        (b'{"error": {"code": "no_video", "message": "m"}}', 400, "no_video", "m"),
        (b'{"code": 404, "type": "ModelNotFoundException", "message": "m"}', 404, "ModelNotFoundException", "404: m"),
        (b"<html>", 502, "no_answer", "HTTP 502: expected JSON, got '<html>'"),
        (b"[1]", 200, "no_answer", "HTTP 200: expected a JSON object, got \\[1\\]"),
        (b'{"a": 1}', None, "no_answer", "gRPC: {'a': 1}"),
        (b'{"error": {"a": 1}}', 200, "no_answer", "HTTP 200: {'error': {'a': 1}}"),
    ],
)
def test_error_answers(body, status, code, message):
    answer = read_answer(body, status=status)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.error["message"].endswith(message.replace("\\", ""))
    assert answer.is_from_handler == (code == "no_video")


@pytest.fixture(scope="module")
def grpc_server():
    """A server that answers with the input map.

    Model `verbose` doubles the video, and `missing` does not exist. A model with an underscore gets an error of the
    handler with this code, and `STATUS: MESSAGE` one of TorchServe.
    """
    messages, services = load_proto("inference.proto")

    class Servicer(services.InferenceAPIsServiceServicer):
        def Predictions(self, request, context):
            if request.model_name == "missing":
                context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
            status, _, message = request.model_name.partition(": ")
            if message:
                context.abort(grpc.StatusCode[status], f"{message}\nInternalServerException")
            if "_" in request.model_name:
                return messages.PredictionResponse(prediction=json.dumps(handler_error(request.model_name)).encode())
            inputs = {name: value.decode() for name, value in request.input.items()}
            metadata = dict(context.invocation_metadata())
            if request.model_name == "verbose":
                inputs["data"] *= 2
            video = {**inputs, "version": request.model_version, "token": metadata.get("authorization")}
            return messages.PredictionResponse(prediction=json.dumps({**GOOD, "video": video}).encode())

    grpc_server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", -1)])
    services.add_InferenceAPIsServiceServicer_to_server(Servicer(), grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    yield f"127.0.0.1:{port}"
    grpc_server.stop(None).wait()


def test_grpc_request(grpc_server):
    answer = classify_grpc(b"video", address=grpc_server, model="m/2.0", parameters={"top_k": 3}, token="key")
    assert (answer.status, answer.is_from_handler) == (None, True)
    assert answer.body["video"] == {"data": "video", "top_k": "3", "version": "2.0", "token": "Bearer key"}
    missing = classify_grpc(b"video", address=grpc_server, model="missing")
    assert missing.error == {"code": "not_found", "message": "no such model"}


def test_grpc_messages_larger_than_4_mb(grpc_server):
    answer = classify_grpc(b"a" * 3_000_000, address=grpc_server, model="verbose")
    assert len(answer.body["video"]["data"]) == 6_000_000


@pytest.mark.parametrize(
    "ask, code", [(classify_rest, "no_answer"), (classify_grpc, "unavailable")], ids=["REST", "gRPC"]
)
def test_failures_without_server(tmp_path, ask, code):
    address = {"url" if ask is classify_rest else "address": CLOSED_ADDRESS}
    answer = ask(b"video", timeout_s=float(classify.MAX_TIMEOUT_S), **address)
    assert (answer.error["code"], answer.status) == (code, None)
    for name, reason in (("missing.mp4", "No such file or directory"), (".", "Is a directory")):
        path = tmp_path / name
        assert ask(path, **address).error == {"code": "no_file", "message": f"{reason}: {path}"}


@pytest.mark.parametrize("options", [{"url": "http://a..b"}, {"token": "\u20ac"}])
def test_invalid_host_or_header_reported(options):
    answer = classify_rest(b"video", **{"url": CLOSED_ADDRESS, **options})
    assert (answer.error["code"], answer.status) == ("no_answer", None)


@pytest.fixture
def delays_s(monkeypatch):
    """The delays between retries, which take no time."""
    delays_s = []
    monkeypatch.setattr(client.time, "sleep", delays_s.append)
    return delays_s


def handler_error(code):
    return {"error": {"code": code, "message": "id 1234"}}


@pytest.mark.parametrize(
    "status, answer",
    [
        (500, WORKER_DIED),
        (507, {**WORKER_DIED, "code": 507}),
        (500, handler_error("internal_error")),
        (507, handler_error("out_of_memory")),
        (503, {"code": 503, "type": "ServiceUnavailableException", "message": "Model m has no worker to serve"}),
        (502, b"<html>"),
        (429, handler_error("too_many_requests")),
    ],
)
def test_errors_of_server_retried(server, delays_s, status, answer):
    server.answers[b"video"] = (status, answer)
    assert with_retries(lambda: classify_rest(b"video", url=server.address), retries=3).status == status
    assert (len(server.requests), delays_s) == (4, [1, 2, 4])


@pytest.mark.parametrize(
    "status, answer",
    [
        (400, handler_error("bad_json")),
        (404, {"code": 404, "type": "ModelNotFoundException", "message": "no such model"}),
        (413, b""),
        (413, handler_error("decode_timeout")),
        (422, handler_error("decoder_crash")),
        (501, handler_error("not_supported")),
    ],
)
def test_errors_of_request_not_retried(server, delays_s, status, answer):
    server.answers[b"video"] = (status, answer)
    assert with_retries(lambda: classify_rest(b"video", url=server.address), retries=3).status == status
    assert (len(server.requests), delays_s) == (1, [])


@pytest.mark.parametrize(
    "model, calls",
    [
        ("INTERNAL: Worker died.", 4),
        ("RESOURCE_EXHAUSTED: Worker died.", 4),
        ("INTERNAL: Model m has no worker to serve inference request.", 4),
        ("internal_error", 4),
        ("decoders_busy", 4),
        ("RESOURCE_EXHAUSTED: message too large", 1),
        ("missing", 1),
        ("corrupt_video", 1),
    ],
)
def test_retries_over_grpc(grpc_server, delays_s, model, calls):
    answer = with_retries(lambda: classify_grpc(b"video", address=grpc_server, model=model), retries=3)
    assert answer.error is not None and delays_s == [1, 2, 4][: calls - 1]


def test_retry_stops_at_answer(delays_s):
    died = failure("internal", "Worker died.")
    answers = iter([died, client.Answer(GOOD), died])
    assert with_retries(lambda: next(answers), retries=3).body == GOOD


# Keys


def write_key(path, key, *, modified_s=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"inference": {"key": key}}))
    if modified_s is not None:
        os.utime(path, (modified_s, modified_s))


def test_order_of_key_files(tmp_path, monkeypatch):
    assert find_key("inference") is None
    write_key(tmp_path / "state" / "vivit" / "b" / "key_file.json", "newest", modified_s=200)
    write_key(tmp_path / "state" / "vivit" / "a" / "key_file.json", "older", modified_s=100)
    assert find_key("inference") == "newest"
    write_key(tmp_path / ".server" / "key_file.json", "quickstart", modified_s=300)
    assert find_key("inference") == "quickstart"
    write_key(tmp_path / "key_file.json", "stale", modified_s=50)
    assert find_key("inference") == "quickstart"
    write_key(tmp_path / "key_file.json", "current directory", modified_s=400)
    assert find_key("inference") == "current directory"
    monkeypatch.setenv("VIVIT_KEY_FILE", str(tmp_path / "named.json"))
    assert find_key("inference") == "current directory"
    write_key(tmp_path / "named.json", "named")
    assert find_key("inference") == "named"
    assert find_key("management") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"inference": "a"}', '{"inference": {"key": 1}}'])
def test_invalid_key_file_skipped(tmp_path, text):
    write_key(tmp_path / ".server" / "key_file.json", "next", modified_s=100)
    (tmp_path / "key_file.json").write_text(text)
    assert find_key("inference") == "next"


@pytest.mark.parametrize(
    "flags, variables, expected",
    [
        ([], {}, "Bearer file"),
        ([], {"VIVIT_TOKEN": "variable"}, "Bearer variable"),
        (["--token", "flag"], {"VIVIT_TOKEN": "variable"}, "Bearer flag"),
    ],
)
def test_key_sent(server, tmp_path, monkeypatch, flags, variables, expected):
    write_key(tmp_path / "key_file.json", "file")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(server, "-", *flags) == 0
    assert server.requests[0].headers["Authorization"] == expected


def test_found_key_not_sent_to_other_hosts(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(
        classify, "classify_rest", lambda video, *, token, **_: sent.append(token) or client.Answer(GOOD)
    )
    write_key(tmp_path / "key_file.json", "found")
    (tmp_path / "a.mp4").write_bytes(b"a")
    for url in ("http://example.com:8080", "example.com", "localhost:8080", "http://[::1]:8080"):
        classify.main(["a.mp4", "--url", url])
    monkeypatch.setenv("VIVIT_KEY_FILE", str(tmp_path / "key_file.json"))
    classify.main(["a.mp4", "--url", "https://example.com"])
    monkeypatch.setenv("VIVIT_KEY_FILE", str(tmp_path / "missing.json"))
    classify.main(["a.mp4", "--url", "https://example.com"])
    assert sent == [None, None, "found", "found", "found", None]


def test_invalid_address_reported(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"a")
    assert classify.main(["a.mp4", "--url", "http://[::1"]) == 1
    assert "no_answer: InvalidURL: " in capsys.readouterr().out


# The command


@pytest.fixture(autouse=True)
def stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"from stdin")))


def run(server, *arguments):
    return classify.main([*map(str, arguments), "--url", server.address])


@pytest.fixture
def folder(tmp_path):
    """Files whose content is their path; two have the same name, two are hidden, and one folder is empty."""
    root = tmp_path / "videos"
    for name in ("b.mp4", "a.mp4", "sub/a.mp4", ".hidden.mp4", ".git/c.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "empty").mkdir()
    return root


def test_text_output(server, folder, capsys):
    server.answers = {
        b"b.mp4": (404, {"code": 404, "type": "NotFound", "message": "first\n  second\r\n\n"}),
        b"sub/a.mp4": (200, {**GOOD, "warnings": ["frames repeat"]}),
    }
    assert run(server, folder, "-", "missing.mp4") == 1
    width = len(str(folder / "sub/a.mp4"))
    assert capsys.readouterr().out.splitlines() == [
        f"{folder / 'a.mp4'!s:<{width}}  walking 50.0%",
        f"{'b.mp4':<{width}}  NotFound: HTTP 404: first second",
        f"{folder / 'sub/a.mp4'!s:<{width}}  walking 50.0%  [frames repeat]",
        f"{'-':<{width}}  walking 50.0%",
        f"{'missing.mp4':<{width}}  no_file: No such file or directory: missing.mp4",
    ]
    assert sorted(request.body for request in server.requests) == [b"a.mp4", b"b.mp4", b"from stdin", b"sub/a.mp4"]


def test_text_output_of_several_label_heads(server, tmp_path, capsys):
    pair = {"label": "onion + cut", "score": 0.54, "labels": {"noun": "onion", "verb": "cut"}}
    heads = {
        "noun": [{"label": "onion", "score": 0.6}, {"label": "pan", "score": 0.25}],
        "verb": [{"label": "cut", "score": 0.9}],
    }
    answer = {"predictions": [pair], "heads": heads, "video": {}, "warnings": ["short"]}
    server.answers[b"video"] = (200, answer)
    (tmp_path / "a.mp4").write_bytes(b"video")
    assert run(server, "a.mp4") == 0
    heads = "noun: onion 60.0%, pan 25.0%  verb: cut 90.0%"
    assert capsys.readouterr().out == f"a.mp4  onion + cut 54.0%  {heads}  [short]\n"


def test_folder_without_files_reported(server, folder, capsys):
    assert run(server, folder / "empty") == 1
    assert "no_file: expected a file or a folder with files" in capsys.readouterr().out


def test_json_in_input_order(server, folder, capsys):
    assert run(server, folder / "b.mp4", folder / "a.mp4", "--json", "--top-k", "1") == 0
    expected = [{"file": str(folder / name), **GOOD} for name in ("b.mp4", "a.mp4")]
    assert json.loads(capsys.readouterr().out) == expected
    assert server.requests[0].headers["X-Top-K"] == "1"


def test_json_lines_in_order_of_completion(server, folder, capsys, monkeypatch):
    b_is_answered = threading.Event()
    server.answers = {
        b"a.mp4": lambda: b_is_answered.wait(10) and (200, GOOD),
        b"b.mp4": lambda: (200, {**GOOD, "warnings": ["first"]}),
    }

    def print_and_continue(text, **options):
        print(text, **options)
        b_is_answered.set()

    # The second answer is sent only after the first one is printed.
    monkeypatch.setattr(classify, "print", print_and_continue, raising=False)
    assert run(server, folder / "a.mp4", folder / "b.mp4", "--jsonl") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == [str(folder / "b.mp4"), str(folder / "a.mp4")]
    assert rows[1] == {"file": str(folder / "a.mp4"), **GOOD}


@pytest.mark.parametrize("flag", [None, "--json", "--jsonl"])
def test_finished_answers_printed_after_interrupt(server, folder, capsys, flag):
    released = threading.Event()

    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        released.wait(10)
        return 200, GOOD

    server.answers = {b"b.mp4": interrupt}
    paths = [folder / "b.mp4", folder / "a.mp4", folder / "sub/a.mp4"]
    # One request at a time, in this order: `a.mp4` is answered, `b.mp4` is pending, `sub/a.mp4` is not sent.
    assert run(server, paths[1], paths[0], paths[2], "--jobs", "1", *filter(None, [flag])) == 130
    released.set()
    output, errors = capsys.readouterr()
    assert output.count("walking") == 1
    if flag:
        rows = json.loads(output if flag == "--json" else f"[{output}]")
        assert [row["file"] for row in rows] == [str(paths[1])]
    assert "interrupted: 2 of 3 videos have no answer" in errors


def test_later_answer_printed_after_interrupt(server, folder, capsys, monkeypatch):
    others_answered, released = threading.Event(), threading.Event()

    def interrupt():
        others_answered.wait(10)
        time.sleep(0.05)  # the client's thread stores the answer meanwhile
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        released.wait(10)
        return 200, GOOD

    server.answers = {b"a.mp4": interrupt}

    def count_answers(video, **options):
        answer = classify_rest(video, **options)
        others_answered.set()
        return answer

    monkeypatch.setattr(classify, "classify_rest", count_answers)
    assert run(server, folder / "a.mp4", folder / "b.mp4") == 130
    released.set()
    output, errors = capsys.readouterr()
    assert output.split() == ["b.mp4", "walking", "50.0%"]
    assert "interrupted: 1 of 2" in errors


def test_program_prints_immediately_and_exits_on_interrupt(server, folder):
    released = threading.Event()
    server.answers = {b"b.mp4": lambda: released.wait(30) and (200, GOOD)}
    command = [sys.executable, ROOT / "scripts" / "classify.py", folder, "--url", server.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert "walking" in program.stdout.readline()
        program.send_signal(signal.SIGINT)
        assert program.wait(10) == 130
        assert "of 3 videos have no answer" in program.stderr.read()
    released.set()


def test_retries_and_hint_for_rejected_key(server, capsys, delays_s):
    rejected = {"code": 400, "type": "InvalidKeyException", "message": "Token is invalid"}
    answers = iter([(500, WORKER_DIED), (400, rejected)])
    server.answers = {b"from stdin": lambda: next(answers)}
    assert run(server, "-") == 1
    assert len(server.requests) == 2
    assert "--token or VIVIT_TOKEN" in capsys.readouterr().err


@pytest.mark.parametrize("package, address", [("requests", "--url"), ("grpc", "--grpc"), ("grpc_tools", "--grpc")])
def test_missing_package_named(monkeypatch, capsys, package, address):
    monkeypatch.setitem(sys.modules, package, None)
    assert classify.main(["-", address, CLOSED_ADDRESS]) == 1
    assert capsys.readouterr().err == (
        f"vivit classify: {package} is missing: run `pip install .` in the checkout, which installs all dependencies\n"
    )


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--jobs", "0", "must be an integer >= 1, got '0'"),
        ("--jobs", "1.5", "must be an integer >= 1, got '1.5'"),
        ("--top-k", "-1", "must be an integer >= 1, got '-1'"),
        ("--retries", "-1", "must be an integer >= 0, got '-1'"),
        ("--timeout-s", "0", "must be a number > 0 and <= 1000000, got '0'"),
        ("--timeout-s", "nan", "must be a number > 0 and <= 1000000, got 'nan'"),
        ("--timeout-s", "1e300", "must be a number > 0 and <= 1000000, got '1e300'"),
        ("--timeout-s", "soon", "must be a number > 0 and <= 1000000, got 'soon'"),
    ],
)
def test_invalid_number_rejected(capsys, flag, value, message):
    with pytest.raises(SystemExit) as exit:
        classify.main(["clip.mp4", flag, value])
    assert exit.value.code == 2
    assert f"argument {flag}: {message}" in capsys.readouterr().err


def test_limits_of_numbers_accepted():
    flags = ["--jobs", "1", "--top-k", "1", "--retries", "0", "--timeout-s", "1000000"]
    arguments = classify.parse_arguments(["clip.mp4", *flags])
    assert (arguments.jobs, arguments.top_k, arguments.retries, arguments.timeout_s) == (1, 1, 0, 1e6)


def test_stdin_only_once(capsys):
    with pytest.raises(SystemExit):
        classify.main(["-", "-"])
    assert "expected - at most once" in capsys.readouterr().err
