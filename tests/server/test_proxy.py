"""The shipped nginx configuration, in front of TorchServe and of a web server that records what it receives."""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import time

import psutil
import pytest
import requests
import yaml

from handler.assets import MODEL_CONFIG, SERVER_CONFIG
from handler.cli.client import authorization, classify_rest, read_answer
from handler.cli.ports import find_free_ports
from handler.cli.properties import read_properties
from stress.nginx import CONFIG, NGINX, running_proxy
from stress.server import is_same_answer
from tests.support.server import in_flight, others, results, suspended, wait_for
from tests.support.web_server import web_server

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian's package: nginx-light)")

MAX_IN_PROGRESS = 16  # per client; nginx.conf
KEY = "key"


@pytest.fixture(scope="module")
def proxy(server, tmp_path_factory):
    """The shipped configuration, except for the rate, in front of the shared server."""
    changes = {"rate=20r/s": "rate=1000r/s"}
    with running_proxy(server.inference_url, directory=tmp_path_factory.mktemp("proxy"), changes=changes) as proxy:
        yield proxy


@pytest.fixture
def classify(server, proxy, monkeypatch):
    """Classifies a video through the proxy."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(proxy.certificate))

    def classify(video, **options):
        return classify_rest(video, url=proxy.url, token=server.token("inference"), timeout_s=60, **options)

    return classify


@pytest.fixture
def upstream():
    """A web server that accepts one key; yields its address and the list of requests it has received after /ping."""
    received = []

    def respond(request):
        if request.path == "/ping":
            return (200 if request.headers["Authorization"] == f"Bearer {KEY}" else 400), b"{}"
        received.append(request)
        return 200, b"{}"

    with web_server(respond) as port:
        yield f"http://127.0.0.1:{port}", received


def read_response(connection):
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, response.read()


def send(proxy, *parts):
    """Sends bytes on a new connection, with pauses; returns the status and the body of the answer."""
    with proxy.connect() as connection:
        for index, part in enumerate(parts):
            time.sleep(0.1 if index else 0)
            connection.sendall(part)
        return read_response(connection)


def head(method="POST", path="/predictions/vivit", key=KEY, **headers):
    fields = {"Host": "vivit.example.org", **authorization(key), **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode()


def error_code(body):
    return json.loads(body)["error"]["code"]


# Requests that are passed on


def test_answers_equal_direct_ones(server, proxy, classify, video, expected):
    for send_as in ("raw", "multipart", "json"):
        assert is_same_answer(classify(video, send_as=send_as), expected)
    assert len(classify(video, parameters={"top_k": 2}).body["predictions"]) == 2
    assert is_same_answer(classify(video, model="vivit/1.0"), expected)
    large = bytes(7_000_000)  # kept in a temporary file
    for rejected in (b"hello", large):
        assert classify(rejected) == server.rest(rejected)
    assert classify(video, model="none").error["code"] == "ModelNotFoundException"
    ping = requests.get(f"{proxy.url}/ping", headers=server.headers("inference"), verify=proxy.certificate, timeout=60)
    assert ping.json() == {"status": "Healthy"}


def test_http2(server, proxy, video, expected):
    (header,) = (f"{name}: {value}" for name, value in server.headers("inference").items())
    done = subprocess.run(
        ["curl", "--silent", "--http2", "--cacert", proxy.certificate, "--write-out", "\n%{http_version}"]
        + ["-X", "POST", "-T", "-", "-H", header, f"{proxy.url}/predictions/vivit"],
        input=video,
        capture_output=True,
        timeout=60,
        check=True,
    )
    body, version = done.stdout.rsplit(b"\n", 1)
    assert version == b"2"
    assert is_same_answer(read_answer(body, status=200), expected)


def test_only_canonical_request_and_known_headers_passed_on(upstream, tmp_path):
    """TorchServe receives a POST request with a complete body and its length, however it arrived."""
    url, received = upstream
    headers = {"X_Top_K": "3", "X_Forwarded_For": "127.0.0.1", "Content_Type": "video/mp4", "describe": "True"}
    with running_proxy(url, directory=tmp_path) as proxy:
        for method, path in (
            ("POST", "/%70redictions//vivit/1.0?top_k=1"),
            ("PUT", "/models/../predictions/./vivit/1.0"),  # the upstream server answers no PUT
        ):
            request = head(method, path, Transfer_Encoding="chunked", Connection="Keep-Alive, X-Top-K", **headers)
            assert send(proxy, request, b"3\r\nabc\r\n", b"2\r\nde\r\n0\r\n\r\n") == (200, b"{}")
    for request in received:
        assert (request.path, request.body) == ("/predictions/vivit/1.0", b"abcde")
        assert {name.lower(): value for name, value in request.headers.items()} == {
            "host": "torchserve",
            "connection": "close",
            "authorization": f"Bearer {KEY}",
            "content-length": "5",
            "content-type": "video/mp4",
            "x-top-k": "3",
        }
    assert len(received) == 2


# Requests that the proxy answers itself


OTHER_PATHS = (
    *("/", "/models", "/models/vivit", "//models", "/predictions/../models", "/%6dodels", "/metrics", "/workflows"),
    *("/api-description", "/token?type=inference", "/invocations?model_name=vivit", "/wfpredict/a", "/key", "/error"),
    *("/v1/models/vivit:predict", "/v2/models/vivit/infer", "/predictions", "/predictions/", "/predictions/a/b/c"),
    *("/predictions/..%2fmodels", "/predictions/%2e%2e%2fmodels", "/predictions/a%20b", "/predictions/vivit;a"),
    *("/predictions/.hidden", "/PREDICTIONS/vivit", "/ping/", "http://127.0.0.1:8081/models"),
)
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
REJECTED = {
    404: [f"{method} {path}" for method in METHODS for path in OTHER_PATHS],
    405: [
        *(f"{method} /predictions/vivit" for method in (*METHODS, "PROPFIND") if method not in ("POST", "PUT")),
        *(f"{method} /ping" for method in METHODS if method != "GET"),
        "TRACE /ping",
    ],
    400: [
        *("CONNECT 127.0.0.1:8081", "GET ping", "GE\0T /ping", "GET /predictions/vivit%00", "GET /../models"),
        "GET /predictions/..%2f..%2fmodels",
    ],
    414: [f"POST /predictions/{'a' * 10_000}"],
}


def test_other_requests_rejected(upstream, tmp_path):
    url, received = upstream
    with running_proxy(url, directory=tmp_path, changes={"rate=20r/s": "rate=1000r/s"}) as proxy:
        for expected, lines in REJECTED.items():
            for line in lines:
                status, body = send(proxy, head(*line.split(" ", 1)))
                assert status == expected, line[:100]
                assert error_code(body), line[:100]
    assert received == []


@pytest.mark.parametrize(
    "request_bytes",
    [
        head(Content_Length="5", Transfer_Encoding="chunked") + b"0\r\n\r\nGET /models HTTP/1.1\r\n\r\n",
        head(Content_Length="5\r\nContent-Length: 6") + b"abcdef",
        head(Transfer_Encoding="xchunked") + b"0\r\n\r\n",
        head(Transfer_Encoding="chunked") + b"zz\r\nabc\r\n",
        head(Content_Length="-1"),
        head(**{f"X_{index}": "a" * 100 for index in range(100)}),
    ],
    ids=["length and chunked", "two lengths", "unknown coding", "bad chunk", "negative length", "large header"],
)
def test_invalid_http_rejected(upstream, tmp_path, request_bytes):
    url, received = upstream
    with running_proxy(url, directory=tmp_path) as proxy:
        status, body = send(proxy, request_bytes)
        assert status in (400, 501) and (status == 501 or error_code(body) == "bad_request")
    assert received == []


def test_upload_without_key_not_read(server, proxy):
    """The answer comes before the body is sent, and TorchServe receives nothing of it."""
    for key in (None, "wrong", server.token("management")):
        status, body = send(proxy, head(key=key, Content_Length=str(100_000_000)))
        assert (status, error_code(body)) == (401, "unauthorized")


def test_too_large_upload_rejected(proxy, server):
    limit = int(read_properties(SERVER_CONFIG)["max_request_size"])
    status, body = send(proxy, head(key=server.token("inference"), Content_Length=str(limit + 1)))
    assert (status, error_code(body)) == (413, "upload_too_large")
    assert str(limit) in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("status", [400, 404, 413, 500, 503, 507])
def test_errors_of_server_passed_on(tmp_path, status):
    body = b'{"error": {"code": "of the server", "message": ""}}'
    with (
        web_server(lambda request: (500 if request.path == "/ping" else status, body)) as port,
        running_proxy(f"http://127.0.0.1:{port}", directory=tmp_path) as proxy,
    ):
        assert send(proxy, head(Content_Length="0")) == (status, body)


def test_upstream_failures(upstream, tmp_path):
    """No answer within the limit, and no server at all."""
    (port,) = find_free_ports(1)
    with running_proxy(f"http://127.0.0.1:{port}", directory=tmp_path / "down") as proxy:
        status, body = send(proxy, head("GET", "/ping"))
        assert (status, error_code(body)) == (502, "unavailable")
        status, body = send(proxy, head(Content_Length="0"))
        assert (status, error_code(body)) == (502, "unavailable")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with running_proxy(
            url, directory=tmp_path, changes={"proxy_read_timeout 310s": "proxy_read_timeout 1s"}
        ) as proxy:
            status, body = send(proxy, head("GET", "/ping"))
            assert (status, error_code(body)) == (504, "timeout")


# Limits


def test_limits_match_those_of_the_server():
    text = CONFIG.read_text()
    limit = read_properties(SERVER_CONFIG)["max_request_size"]
    assert f"client_max_body_size {limit};" in text
    assert f"larger than {limit} bytes" in text
    timeout_s = yaml.safe_load(MODEL_CONFIG.read_text())["responseTimeout"]
    (proxy_timeout_s,) = map(int, re.findall(r"^ {8}proxy_read_timeout (\d+)s;", text, re.MULTILINE))
    assert timeout_s < proxy_timeout_s <= timeout_s + 30
    assert f"limit_conn in_progress {MAX_IN_PROGRESS};" in text


@pytest.mark.parametrize(
    "beginning",
    [b"", b"POST /predictions/vivit HT", head(Content_Length="1000") + b"abc"],
    ids=["idle", "header", "body"],
)
def test_stalled_client_disconnected(upstream, tmp_path, beginning):
    url, received = upstream
    changes = {f"{kind}_timeout 10s": f"{kind}_timeout 1s" for kind in ("client_header", "client_body")}
    with running_proxy(url, directory=tmp_path, changes=changes) as proxy, proxy.connect(timeout_s=30) as connection:
        connection.sendall(beginning)
        answer = connection.recv(100)
        assert answer == b"" or b"408" in answer
        assert received == []


def test_rate_limited(upstream, tmp_path):
    url, _ = upstream
    with running_proxy(url, directory=tmp_path, changes={"rate=20r/s": "rate=1r/s", "burst=60": "burst=5"}) as proxy:
        answers = [send(proxy, head("GET", "/ping")) for _ in range(10)]
    rejected = [body for status, body in answers if status == 429]
    assert 1 <= len(rejected) <= 4  # fewer if this takes seconds
    assert {error_code(body) for body in rejected} == {"too_many_requests"}


def test_abandoned_calls_count_until_answered(server, proxy, classify, video, expected):
    """Clients that disconnect cannot fill the server's queue."""
    (worker,) = server.workers()
    key = server.token("inference")
    with suspended([worker]):
        for _ in range(3 * MAX_IN_PROGRESS):
            with proxy.connect() as connection:
                connection.sendall(head(key=key, Content_Length=str(len(video))) + video)
        wait_for(lambda: classify(video).status == 429)
        assert server.pending_requests() < MAX_IN_PROGRESS
    wait_for(lambda: is_same_answer(classify(video), expected))
    with in_flight(lambda: classify(video), count=8, suspend=[worker]) as futures:
        pass
    assert others(results(futures), expected) == []


def test_pipelined_requests_without_reading(server, proxy, tmp_path, classify, video, expected):
    """An unread answer stops neither the proxy nor the server, and the connection is closed."""
    before = server.process.memory_info().rss
    requests_sent = b"OPTIONS / HTTP/1.1\r\nHost: a\r\n\r\n" * 10_000  # 24 kB each, if TorchServe answers
    with (
        running_proxy(
            server.inference_url, directory=tmp_path, changes={"send_timeout 10s": "send_timeout 1s"}
        ) as strict,
        strict.connect(timeout_s=30) as connection,
    ):
        with contextlib.suppress(OSError):
            for start in range(0, len(requests_sent), 10_000):
                connection.sendall(requests_sent[start : start + 10_000])
        assert is_same_answer(classify(video), expected)
        wait_for(lambda: not client_connections(strict))
    assert server.process.memory_info().rss - before < 100e6


def client_connections(proxy):
    """The connections of clients that the proxy's processes have open."""
    port = int(proxy.url.rsplit(":", 1)[1])
    connections = [each for worker in psutil.Process(proxy.pid).children() for each in worker.net_connections("tcp")]
    return [each for each in connections if each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED]
