"""What a request may say, in every form that TorchServe hands over, and what is said back."""

import base64
import json

import pytest

from handler.protocol import api

VIDEO = b"\x00\x00\x00\x18ftypmp42 and so on"
BASE64 = base64.b64encode(VIDEO).decode()


def parse(row, *, headers={}, default_top_k=5, num_labels=9, max_upload_bytes=1000):
    return api.parse_request(
        row, headers=headers, default_top_k=default_top_k, num_labels=num_labels, max_upload_bytes=max_upload_bytes
    )


@pytest.mark.parametrize(
    "row",
    [
        {"body": bytearray(VIDEO)},
        {"data": VIDEO},
        {"video": VIDEO},
        {"body": {"video": BASE64}},
        {"body": {"data": BASE64}},
        {"data": json.dumps({"video": BASE64}).encode()},
        {"body": bytearray(json.dumps({"video": BASE64}).encode())},
        {"body": "\n " + json.dumps({"video": BASE64})},
        {"body": {"video": "data:video/mp4;base64," + BASE64}},
        {"body": {"video": "\n".join([BASE64[:8], BASE64[8:]])}},
    ],
    ids=[
        "raw",
        "data part",
        "video part",
        "parsed JSON",
        "JSON data key",
        "gRPC JSON",
        "JSON bytes",
        "JSON text",
        "data URL",
        "base64 with line breaks",
    ],
)
def test_every_form_of_upload_gives_the_same_bytes(row):
    assert parse(row) == api.Request(video=VIDEO, top_k=5)


def test_a_text_body_gives_back_the_bytes_that_came():
    assert parse({"body": "#EXTM3U\nclip-ä.ts"}).video == "#EXTM3U\nclip-ä.ts".encode()


@pytest.mark.parametrize(
    "row",
    [
        {"body": VIDEO, "top_k": "3"},
        {"data": VIDEO, "top_k": b"3"},
        {"data": VIDEO, "top_k": bytearray(b"3")},
        {"body": {"video": BASE64, "top_k": 3}},
        {"body": {"video": BASE64, "top_k": "3"}},
        {"body": {"video": BASE64}, "top_k": "3"},
    ],
    ids=["query", "gRPC", "multipart", "JSON number", "JSON text", "JSON with query"],
)
def test_top_k_is_read_wherever_it_stands(row):
    assert parse(row).top_k == 3


@pytest.mark.parametrize("header", ["X-Top-K", "x-top-k"])
def test_a_header_gives_a_raw_body_its_parameters(header):
    assert parse({"body": VIDEO}, headers={"Host": "here", "X-Forwarded-For": "there", header: "3"}).top_k == 3


def test_the_rows_own_parameter_wins_over_a_header():
    assert parse({"body": VIDEO, "top_k": "2"}, headers={"X-Top-K": "3"}).top_k == 2


def test_the_model_name_that_torchserve_passes_on_is_no_parameter_of_ours():
    assert parse({"body": VIDEO, "model_name": b"vivit", "model_version": b"1.0"}).video == VIDEO


def test_the_default_top_k_is_capped_at_the_number_of_classes():
    assert parse({"body": VIDEO}, default_top_k=5, num_labels=2).top_k == 2


@pytest.mark.parametrize("top_k", [0, -1, 10, 1e9, 2.5, True, None, "", "five", "1 ", "٣", "9" * 5000, [1], b"\xff"])
def test_a_top_k_out_of_range_is_refused_with_the_range(top_k):
    with pytest.raises(api.BadRequest, match="top_k must be an integer from 1 to 9") as caught:
        parse({"body": VIDEO, "top_k": top_k})
    assert (caught.value.status, caught.value.code) == (400, "bad_parameter")


@pytest.mark.parametrize(
    "row, code",
    [
        ({}, "no_video"),
        ({"top_k": "3"}, "no_video"),
        ({"body": {"top_k": 3}}, "no_video"),
        ({"body": b""}, "empty_body"),
        ({"body": {"video": ""}}, "empty_body"),
        ({"data": VIDEO, "video": VIDEO}, "several_videos"),
        ({"video": VIDEO, "data": json.dumps({"video": base64.b64encode(VIDEO).decode()})}, "several_videos"),
        ({"top_k": b"3", "data": json.dumps({"video": base64.b64encode(VIDEO).decode(), "top_k": 2})}, "bad_parameter"),
        ({"body": b'{"video": [' + b"{}," * 100 + b"{}]}"}, "bad_json"),
        ({"body": b'{"' + b"a" * 100_000 + b'": 1, "video": ""}'}, "unknown_parameter"),
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
        ({"body": VIDEO, "frames": "32"}, "unknown_parameter"),
    ],
)
def test_a_malformed_request_is_a_400_with_its_code(row, code):
    with pytest.raises(api.BadRequest) as caught:
        parse(row)
    assert (caught.value.status, caught.value.code) == (400, code)


@pytest.mark.parametrize("body", [b"[]", b"null", b"7", b'"x"', b"\0", b"[" * 100_000, VIDEO])
def test_what_is_sent_as_json_must_be_a_json_object(body):
    with pytest.raises(api.BadRequest) as caught:
        parse({"body": body}, headers={"content-type": "application/json; charset=utf-8"})
    assert caught.value.code == "bad_json"


@pytest.mark.parametrize(
    "body, words",
    [
        (b"{,}", "line 1 column 2"),
        (b'{"video": "\xff"}', "no UTF-8"),
        (b'{"a":' * 100_000, "at most 64 values, got more"),
        (b'{"top_k": ' + b"9" * 5000 + b"}", "too long"),
    ],
)
def test_why_json_cannot_be_parsed_is_told_without_a_word_of_python(body, words):
    with pytest.raises(api.BadRequest, match=words) as caught:
        parse({"body": body})
    assert not any(word in str(caught.value) for word in ("codec", "recursion", "sys."))


def test_an_unknown_parameter_is_answered_with_the_nearest():
    with pytest.raises(api.BadRequest, match="'topk'; did you mean 'top_k'"):
        parse({"body": VIDEO, "topk": "3"})


def test_a_long_parameter_name_is_not_echoed_whole():
    with pytest.raises(api.BadRequest) as caught:
        parse({"body": VIDEO, "x" * 10_000: "1"})
    assert len(str(caught.value)) < 200


def test_what_is_no_video_is_415_and_an_unusable_video_422():
    assert api.status_of("not_a_video") == api.status_of("unsupported_container") == 415
    assert api.status_of("no_frames") == api.status_of("anything else") == 422


def test_an_answer_has_predictions_video_and_warnings():
    answer = api.render_answer(
        [("still", 0.75), ("growing", 0.25)], video={"fps": 25.0}, times_s=[0.0, 1 / 3], warnings=("frames repeat",)
    )
    assert json.loads(json.dumps(answer)) == {
        "predictions": [{"label": "still", "score": 0.75}, {"label": "growing", "score": 0.25}],
        "video": {"fps": 25.0, "frames": [0.0, 0.333]},
        "warnings": ["frames repeat"],
    }


def test_an_error_carries_code_and_message_in_its_body():
    error = api.BadRequest("expected this, got that", code="bad_parameter")
    assert api.render_error(error) == {"error": {"code": "bad_parameter", "message": "expected this, got that"}}


def test_an_internal_error_names_the_request_and_no_cause():
    error = api.InternalError("1234-abcd")
    assert error.status == 500
    assert "1234-abcd" in str(error)


@pytest.mark.parametrize("row", [{"body": VIDEO}, {"body": {"video": BASE64}}])
def test_a_file_of_more_bytes_than_allowed_is_refused_with_both_numbers(row):
    parse(row, max_upload_bytes=len(VIDEO))
    with pytest.raises(api.TooLarge, match=f"at most {len(VIDEO) - 1} bytes, got {len(VIDEO)}") as caught:
        parse(row, max_upload_bytes=len(VIDEO) - 1)
    assert (caught.value.status, caught.value.code) == (413, "upload_too_large")


@pytest.mark.parametrize("code", ["video_too_long", "frame_too_large", "too_many_frames"])
def test_a_video_over_a_limit_is_too_large(code):
    assert api.status_of(code) == 413
