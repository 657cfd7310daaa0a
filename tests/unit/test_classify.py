"""The client without a server: what it refuses to start with, and what it says where there is no answer."""

import sys
from pathlib import Path

import pytest

from handler.cli import classify
from handler.cli.classify import table
from handler.cli.client import classify_grpc, classify_rest

NOBODY = "127.0.0.1:9"


def rest(video, **options):
    return classify_rest(video, url=f"http://{NOBODY}", **options).body


def over_grpc(video, **options):
    return classify_grpc(video, address=NOBODY, **options).body


def parse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["classify.py", "clip.mp4", *arguments])
    return classify.parse_arguments()


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--jobs", "0", "a whole number, 1 or more; got '0'"),
        ("--jobs", "-3", "a whole number, 1 or more; got '-3'"),
        ("--jobs", "1.5", "a whole number, 1 or more; got '1.5'"),
        ("--top-k", "0", "a whole number, 1 or more; got '0'"),
        ("--top-k", "-1", "a whole number, 1 or more; got '-1'"),
        ("--retries", "-1", "a whole number, 0 or more; got '-1'"),
        ("--timeout-s", "0", "a number above 0 and up to 1000000; got '0'"),
        ("--timeout-s", "-1", "a number above 0 and up to 1000000; got '-1'"),
        ("--timeout-s", "nan", "a number above 0 and up to 1000000; got 'nan'"),
        ("--timeout-s", "1e300", "a number above 0 and up to 1000000; got '1e300'"),
        ("--timeout-s", "soon", "a number above 0 and up to 1000000; got 'soon'"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_with_what_is_allowed(monkeypatch, capsys, flag, value, message):
    with pytest.raises(SystemExit) as exit:
        parse(monkeypatch, flag, value)
    assert exit.value.code == 2
    assert f"argument {flag}: must be {message}" in capsys.readouterr().err


def test_the_least_and_the_most_that_make_sense_are_taken(monkeypatch):
    least = parse(monkeypatch, "--jobs", "1", "--top-k", "1", "--retries", "0", "--timeout-s", "0.5")
    assert (least.jobs, least.top_k, least.retries, least.timeout_s) == (1, 1, 0, 0.5)
    assert parse(monkeypatch, "--timeout-s", "1000000").timeout_s == 1e6


@pytest.mark.parametrize("ask", [rest, over_grpc])
def test_the_longest_timeout_is_one_that_can_be_waited(tmp_path, ask):
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"video")
    answer = ask(video, timeout_s=float(classify.MOST_SECONDS))
    assert answer["error"]["code"] in ("no_answer", "unavailable")


@pytest.mark.parametrize("ask", [rest, over_grpc])
@pytest.mark.parametrize("name, reason", [("missing.mp4", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_told_apart_from_a_server_without_an_answer(tmp_path, ask, name, reason):
    assert ask(tmp_path / name) == {"error": {"code": "no_file", "message": f"{reason}: {tmp_path / name}"}}


def test_a_message_of_several_lines_stays_in_the_line_of_its_video():
    videos = [Path("a.mp4"), Path("longer.mp4")]
    failed = {"error": {"code": "internal", "message": "InternalServerException\n  it has no worker\r\n\n"}}
    answered = {"predictions": [{"label": "walking", "score": 0.5}], "warnings": []}
    assert table(videos, [failed, answered]).splitlines() == [
        "a.mp4       internal: InternalServerException it has no worker",
        "longer.mp4  walking 50.0%",
    ]
