"""Requests in every form that TorchServe passes on, and the bodies of responses."""

import base64
import json
import tracemalloc

import pytest

from handler.protocol import (
    ApiError,
    BadRequest,
    DecodersBusy,
    InternalError,
    OutOfMemory,
    Request,
    RequestLimits,
    UploadTooLarge,
    parse_request,
    render_answer,
    render_error,
    status_of_video_error,
)
from handler.views import ViewDefaults, Views

VIDEO = b"\x00\x00\x00\x18ftypmp42 and so on \xff\xff\xfb\xef\xbe"
BASE64 = base64.b64encode(VIDEO).decode()
JSON = json.dumps({"video": BASE64})
VIEWS = {"views": "4x3", "sampling": "dense", "stride_frames": 3, "start_s": 0.25, "end_s": 8}


def parse(row, *, headers=None, default_top_k=5, max_top_k=9, max_upload_bytes=1000):
    limits = RequestLimits(max_upload_bytes=max_upload_bytes, max_top_k=max_top_k, default_top_k=default_top_k)
    return parse_request(dict(row), headers=headers or {}, limits=limits)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"body": bytearray(VIDEO)}, id="raw"),
        pytest.param({"data": VIDEO}, id="data part"),
        pytest.param({"video": VIDEO}, id="video part"),
        pytest.param({"body": {"video": BASE64}}, id="JSON parsed by TorchServe"),
        pytest.param({"body": {"data": BASE64}}, id="JSON key data"),
        pytest.param({"data": JSON.encode()}, id="JSON over gRPC"),
        pytest.param({"body": bytearray(JSON.encode())}, id="JSON bytes"),
        pytest.param({"body": "\n " + JSON}, id="JSON text"),
        pytest.param({"body": {"video": "data:video/mp4;base64," + BASE64}}, id="data URL"),
        pytest.param({"body": {"video": "\n".join([BASE64[:8], BASE64[8:]])}}, id="base64 with line breaks"),
        pytest.param({"body": JSON.replace("/", "\\/").replace("+", "\\u002B")}, id="escaped base64"),
        pytest.param({"body": VIDEO, "model_name": b"vivit", "model_version": b"1.0"}, id="/invocations"),
    ],
)
def test_video_unchanged_in_every_form(row):
    assert parse(row) == Request(video=VIDEO, top_k=5)


def test_decoded_text_restored():
    assert parse({"body": "#EXTM3U\nclip-ä.ts"}).video == "#EXTM3U\nclip-ä.ts".encode()


@pytest.mark.parametrize(
    "row, headers",
    [
        pytest.param({"body": VIDEO, "top_k": "3"}, {}, id="query"),
        pytest.param({"data": VIDEO, "top_k": b"3"}, {}, id="gRPC"),
        pytest.param({"data": VIDEO, "top_k": bytearray(b"3")}, {}, id="multipart"),
        pytest.param({"body": {"video": BASE64, "top_k": 3}}, {}, id="JSON number"),
        pytest.param({"body": {"video": BASE64, "top_k": "3"}}, {}, id="JSON text"),
        pytest.param({"body": {"video": BASE64}, "top_k": "3"}, {}, id="JSON and query"),
        pytest.param({"body": VIDEO}, {"Host": "a", "X-Forwarded-For": "b", "X-Top-K": "3"}, id="header"),
        pytest.param({"body": VIDEO}, {"x-top-k": "3"}, id="lower case header"),
        pytest.param({"body": VIDEO, "top_k": "3"}, {"X-Top-K": "2"}, id="row before header"),
    ],
)
def test_top_k_in_every_form(row, headers):
    assert parse(row, headers=headers).top_k == 3


@pytest.mark.parametrize(
    "row, headers",
    [
        ({"data": VIDEO, **{name: str(value).encode() for name, value in VIEWS.items()}}, {}),
        ({"body": VIDEO}, {f"X-{name}".replace("_", "-").title(): str(value) for name, value in VIEWS.items()}),
        ({"body": json.dumps({"video": BASE64, **VIEWS}).encode()}, {}),
    ],
    ids=["form", "headers", "json"],
)
def test_views_in_every_form(row, headers):
    expected = Views(clips=4, crops=3, sampling="dense", stride_frames=3, start_s=0.25, end_s=8.0)
    assert parse(row, headers=headers).views == expected


def test_default_views():
    defaults = ViewDefaults(views="2x1", sampling="dense", stride_frames=4)
    limits = RequestLimits(max_upload_bytes=1000, max_top_k=9, default_top_k=5, views=defaults)

    def views(**parameters):
        return parse_request({"data": VIDEO, **parameters}, headers={}, limits=limits).views

    assert parse({"data": VIDEO}).views == Views()
    assert views() == Views(clips=2, sampling="dense", stride_frames=4)
    assert views(sampling="uniform", views="1x3") == Views(crops=3)
    assert views(stride_frames="1") == Views(clips=2, sampling="dense", stride_frames=1)


@pytest.mark.parametrize(
    "parameters, code, message",
    [
        ({"views": b"13x1"}, "too_many_views", "at most 12 views, got 13x1 = 13"),
        ({"views": b"4x"}, "bad_parameter", "views must be clips in time"),
        ({"views": b"x" * 10**6}, "bad_parameter", "views must have at most 40 characters"),
        ({"sampling": b"even"}, "bad_parameter", "sampling must be one of uniform, segment, keyframes, dense"),
        ({"stride_frames": b"2"}, "bad_parameter", "stride_frames must be omitted for sampling uniform"),
        ({"stride_frames": b"0", "sampling": b"dense"}, "bad_parameter", "stride_frames must be an integer from 1"),
        ({"start_s": b"-1"}, "bad_parameter", "start_s must be a number >= 0, got '-1'"),
        ({"start_s": b"nan"}, "bad_parameter", "start_s must be a number >= 0"),
        ({"end_s": b"1" * 10**6}, "bad_parameter", "end_s must be a number >= 0"),
        ({"end_s": True}, "bad_parameter", "end_s must be a number >= 0"),
        ({"start_s": b"2", "end_s": b"1.5"}, "bad_parameter", "end_s must be a number > 2.0, got 1.5"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_views_rejected(parameters, code, message):
    with pytest.raises(BadRequest, match=message) as error:
        parse({"data": VIDEO, **parameters})
    assert error.value.code == code and len(str(error.value)) < 250


def test_default_top_k_limited_to_number_of_labels():
    assert parse({"body": VIDEO}, default_top_k=5, max_top_k=2).top_k == 2
    assert [parse({"body": VIDEO, "top_k": top_k}).top_k for top_k in (1, 9)] == [1, 9]


@pytest.mark.parametrize("top_k", [0, -1, 10, 1e9, 2.5, True, None, "", "five", "1 ", "٣", "9" * 5000, [1], b"\xff"])
def test_invalid_top_k_rejected(top_k):
    with pytest.raises(BadRequest, match="top_k must be an integer from 1 to 9, got ") as caught:
        parse({"body": VIDEO, "top_k": top_k})
    assert caught.value.code == "bad_parameter" and len(str(caught.value)) < 100


def test_limits_validated():
    with pytest.raises(ValueError, match="max_upload_bytes must be an integer >= 1, got 0"):
        parse({"body": VIDEO}, max_upload_bytes=0)


@pytest.mark.parametrize(
    "row, code",
    [
        ({}, "no_video"),
        ({"top_k": "3"}, "no_video"),
        ({"body": {"top_k": 3}}, "no_video"),
        ({"video2": VIDEO}, "no_video"),
        ({"body": b""}, "empty_body"),
        ({"body": {"video": ""}}, "empty_body"),
        ({"data": VIDEO, "video": VIDEO}, "several_videos"),
        ({"video": VIDEO, "data": JSON}, "several_videos"),
        ({"video": (VIDEO, VIDEO)}, "several_videos"),
        ({"data": (JSON.encode(), VIDEO), "top_k": b"1"}, "several_videos"),
        ({"video": VIDEO, "video2": VIDEO}, "several_videos"),
        ({"video": VIDEO, "topk": b"3", "Video[1]": VIDEO}, "several_videos"),
        ({"body": VIDEO, "data_2": VIDEO}, "several_videos"),
        ({"body": {"video": BASE64, "videos": BASE64}}, "several_videos"),
        ({"body": f'{{"video": "{BASE64}", "video": "{BASE64}"}}'}, "several_videos"),
        ({"top_k": b"3", "data": JSON[:-1] + ', "top_k": 2}'}, "bad_parameter"),
        ({"data": VIDEO, "top_k": (b"3", b"3")}, "bad_parameter"),
        ({"data": JSON[:-1] + ', "top_k": 2, "top_k": 3}'}, "bad_parameter"),
        ({"body": b'{"' + b"a" * 100_000 + b'": 1, "video": ""}'}, "unknown_parameter"),
        ({"body": VIDEO, "frames": "32"}, "unknown_parameter"),
        ({"body": VIDEO, "video_codec": "h264"}, "unknown_parameter"),
        ({"body": b'{"video": [' + b"{}," * 100 + b"{}]}"}, "bad_json"),
        ({"body": b"{not json"}, "bad_json"),
        ({"body": b"{" * 100_000}, "bad_json"),
        ({"body": b'{"video": "\xff"}'}, "bad_json"),
        ({"body": [BASE64]}, "bad_json"),
        ({"body": None}, "bad_json"),
        ({"body": 7}, "bad_json"),
        ({"body": {"video": [1, 2]}}, "bad_base64"),
        ({"body": {"video": None}}, "bad_base64"),
        ({"body": {"video": "???"}}, "bad_base64"),
        ({"body": {"video": BASE64[:-1]}}, "bad_base64"),
        ({"body": {"video": "ä" * 8}}, "bad_base64"),
    ],
)
def test_malformed_request_rejected(row, code):
    with pytest.raises(BadRequest) as caught:
        parse(row)
    assert (caught.value.status, caught.value.code) == (400, code)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "row, status, code",
    [
        ({"body": {"video": "https://example.com/a.mp4"}}, 400, "bad_base64"),
        ({"data": b'{"data": " rtsp://camera/1"}'}, 400, "bad_base64"),
        ({"video": b"https://example.com/a.mp4"}, 415, "not_a_video"),
        ({"body": bytearray(b"\nHTTP://example.com/a.mp4\n")}, 415, "not_a_video"),
        ({"body": "file:///a.mp4"}, 415, "not_a_video"),
    ],
)
def test_url_instead_of_video_rejected(row, status, code):
    with pytest.raises(ApiError, match="got a URL: the server does not fetch addresses") as caught:
        parse(row)
    assert (caught.value.status, caught.value.code) == (status, code)


@pytest.mark.parametrize("body", [b"[]", b"null", b"7", b'"x"', b"\0", b"[" * 100_000, VIDEO])
def test_json_content_type_requires_object(body):
    with pytest.raises(BadRequest) as caught:
        parse({"body": body}, headers={"content-type": "application/json; charset=utf-8"})
    assert caught.value.code == "bad_json"


@pytest.mark.parametrize(
    "body, problem",
    [
        (b"{,}", "line 1 column 2"),
        (b'{"video": "\xff"}', "only ASCII"),
        (b'{"a":' * 100_000, "at most 64 values, got more"),
        (b'{"top_k": ' + b"9" * 5000 + b"}", "too long"),
    ],
)
def test_json_error_message_without_python_terms(body, problem):
    with pytest.raises(BadRequest, match=problem) as caught:
        parse({"body": body})
    assert not any(term in str(caught.value) for term in ("codec", "recursion", "sys."))


@pytest.mark.parametrize(
    "body",
    [
        JSON[:-2] + '\U0001f600"}',
        JSON[:-2] + '\\ud83d\\ude00"}',
        JSON[:-1] + ', "n\\u00e4me": 1}',
        (b"\xef\xbb\xbf" + JSON.encode()),
        JSON.encode("utf-16"),
        JSON.encode("utf-16-be"),
    ],
    ids=["emoji", "escaped emoji", "escaped name", "byte order mark", "UTF-16", "UTF-16 without mark"],
)
def test_json_beyond_ascii_rejected_before_parsing(body, monkeypatch):
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(BadRequest, match="expected only ASCII characters") as caught:
        parse({"body": body}, headers={"Content-Type": "application/json"})
    assert caught.value.code == "bad_json"


@pytest.mark.parametrize("form", [bytearray, bytes, bytes.decode, json.loads])
@pytest.mark.parametrize("prefix", ["", "data:video/mp4;base64,"])
def test_parsing_frees_each_form_of_video(prefix, form):
    """Rows hold the only reference to their content, as in a worker."""
    content = json.dumps({"video": prefix + "\n".join(["A" * 76] * 5000)}).encode()
    size = len(content)
    tracemalloc.start()
    row = {"body": form(content)}
    del content
    request = parse_request(row, headers={}, limits=RequestLimits(max_upload_bytes=size, max_top_k=9, default_top_k=1))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert row == {} and len(request.video) == 285_000
    assert kept < size and peak < 3.05 * size


def test_unknown_parameter_hint():
    with pytest.raises(BadRequest, match="unknown parameter 'topk': did you mean 'top_k'"):
        parse({"body": VIDEO, "topk": "3"})
    with pytest.raises(BadRequest, match="unknown parameter 'x{40}': known are video, data, top_k"):
        parse({"body": VIDEO, "x" * 10_000: "1"})


@pytest.mark.parametrize("row", [{"body": VIDEO}, {"body": {"video": BASE64}}], ids=["raw", "JSON"])
def test_upload_limit_applies_to_decoded_video(row):
    parse(row, max_upload_bytes=len(VIDEO))
    with pytest.raises(UploadTooLarge, match=f"at most {len(VIDEO) - 1} bytes, got {len(VIDEO)}") as caught:
        parse(row, max_upload_bytes=len(VIDEO) - 1)
    assert (caught.value.status, caught.value.code) == (413, "upload_too_large")


@pytest.mark.parametrize(
    "code, status",
    [
        ("video_too_long", 413),
        ("decode_cost", 413),
        ("frame_too_large", 413),
        ("too_many_frames", 413),
        ("decode_timeout", 413),
        ("decode_memory", 413),
        ("not_a_video", 415),
        ("unsupported_container", 415),
        ("unsupported_codec", 415),
        ("no_frames", 422),
        ("any other", 422),
    ],
)
def test_status_of_video_error(code, status):
    assert status_of_video_error(code) == status


def test_answer_body():
    answer = render_answer(
        [("still", 0.75), ("growing", 0.25)], video={"fps": 25.0}, frame_times_s=[0.0, 1 / 3], warnings=("repeated",)
    )
    assert json.loads(json.dumps(answer)) == {
        "predictions": [{"label": "still", "score": 0.75}, {"label": "growing", "score": 0.25}],
        "video": {"fps": 25.0, "frame_times_s": [0.0, 0.333], "frames": [0.0, 0.333]},
        "warnings": ["repeated"],
    }


@pytest.mark.parametrize(
    "error, status, code, message",
    [
        (BadRequest("expected a, got b", code="bad_parameter"), 400, "bad_parameter", "expected a, got b"),
        (InternalError("1234-abcd"), 500, "internal_error", "1234-abcd"),
        (DecodersBusy(), 503, "decoders_busy", "send the request again"),
        (OutOfMemory("1234-abcd"), 507, "out_of_memory", "1234-abcd"),
    ],
)
def test_error_body(error, status, code, message):
    body = render_error(error)
    assert error.status == status
    assert body.keys() == {"error"} and body["error"].keys() == {"code", "message"}
    assert body["error"]["code"] == code and message in body["error"]["message"]
