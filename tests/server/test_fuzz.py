"""The instruments that send thousands of uploads: their judgement, and that short runs of them find nothing."""

import json
from collections import Counter

import numpy as np
import pytest

from handler.sandbox import DecoderCrashError
from handler.video import NoFramesError
from stress import fuzz, soak
from tests.support.clips import numbered_frames, write_clip


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return {name: write_clip(folder / name, numbered_frames(8)).read_bytes() for name in ("a.mp4", "b.mkv")}


def run(program, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", [program.__name__, *map(str, arguments)])
    return program.main()


def test_a_number_of_a_seed_is_always_the_same_damage_and_others_are_others(small_files):
    inputs = [fuzz.make_input(small_files, seed=1, number=number) for number in range(50)]
    assert inputs == [fuzz.make_input(small_files, seed=1, number=number) for number in range(50)]
    assert len({data for _, data in inputs}) > 45
    assert not {data for _, data in inputs} & set(small_files.values())
    assert fuzz.make_input(small_files, seed=2, number=0) not in inputs


def test_damage_comes_from_every_kind_of_file(small_files):
    names = Counter(fuzz.make_input(small_files, seed=1, number=number)[0] for number in range(100))
    assert names.keys() == small_files.keys() and min(names.values()) > 20


def refusal(code, message="expected a video"):
    return {"error": {"code": code, "message": message}}


ANSWER = {"predictions": [{"label": "still", "score": 0.5}], "video": {}, "warnings": []}


@pytest.mark.parametrize(
    "status, answer, crashed",
    [
        (200, ANSWER, False),
        (0, ANSWER, False),
        (500, ANSWER, True),
        (422, refusal("corrupt_video"), False),
        (0, refusal("corrupt_video"), False),
        (500, refusal("internal_error"), True),
        (503, refusal("corrupt_video"), True),
        (422, refusal("decoder_crash"), True),
        (413, refusal("decode_timeout"), True),
        (422, refusal("corrupt_video", f"cannot read {fuzz.ROOT}/clip.mp4"), True),
        (422, refusal("corrupt_video", "Errno 5"), True),
        (503, {"code": 503, "message": "busy"}, True),
    ],
)
def test_what_a_server_answers_is_judged_by_status_code_and_words(status, answer, crashed):
    assert fuzz.judge_answer(status, answer)[1] == crashed


@pytest.mark.parametrize(
    "error, crashed",
    [
        (NoFramesError("no frame"), False),
        (DecoderCrashError("no frame"), True),
        (NoFramesError("no frame in /tmp/a"), True),
        (ValueError("a fault of ours"), True),
    ],
)
def test_what_a_decoder_gives_is_judged_likewise(error, crashed):
    assert fuzz.judge(error)[1] == crashed


def test_damaged_files_crash_no_decoder(monkeypatch, tmp_path):
    assert run(fuzz, monkeypatch, "--target", "decoder", "--count", 200, "--jobs", 2, "--crashers", tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def sample(requests, rss_bytes):
    return soak.Sample(requests=requests, rss_bytes={"worker": rss_bytes}, descriptors={}, temporary_files=0)


def test_the_slope_is_what_a_thousand_requests_add():
    samples = [sample(number, 10**8 + 250 * number) for number in range(0, 5000, 100)]
    assert np.isclose(soak.slope_kb(samples, "worker"), 250)


def test_a_short_soak_answers_everything_and_holds_on_to_nothing(monkeypatch, tmp_path, capsys):
    status = run(soak, monkeypatch, "--requests", 200, "--clients", 4, "--json", tmp_path / "soak.json")
    report = json.loads((tmp_path / "soak.json").read_text())
    assert (status, report["complaints"]) == (0, [])
    assert sum(count for *_, count in report["outcomes"]) == report["requests"] == 200
    assert report["after"]["rss_bytes"].keys() == {"server", "worker", "decoders"}
    assert "200 requests" in capsys.readouterr().out
