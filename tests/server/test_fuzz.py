"""The fuzzer and the soak test: reproducible inputs, verdicts on results, and short runs without a defect."""

import dataclasses
import json
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from handler.cli.client import Answer
from handler.clips import load_clip
from handler.sandbox import DecoderCrashError, DecoderPool, DecoderSettings
from handler.video import NoFramesError
from stress import fuzz, soak
from stress.inputs import make_input, make_memory_hungry_files
from stress.memory import check_growth
from stress.server import is_same_answer, judge_answer
from tests.support.clips import numbered_frames, write_clip

ROOT = Path(__file__).resolve().parents[2]


def test_inputs_reproducible_and_distinct(tmp_path):
    files = {name: write_clip(tmp_path / name, numbered_frames(8)).read_bytes() for name in ("a.mp4", "b.mkv")}
    inputs = [make_input(files, seed=1, number=number) for number in range(100)]
    assert inputs == [make_input(files, seed=1, number=number) for number in range(100)]
    contents = {data for _, data in inputs}
    assert len(contents) > 90 and not contents & set(files.values())
    assert min(Counter(name for name, _ in inputs).values()) > 20
    assert make_input(files, seed=2, number=0) not in inputs


def answer(**changes):
    body = {"predictions": [{"label": "still", "score": 0.5}], "video": {"fps": 25.0}, "warnings": [], **changes}
    return Answer(body, status=200, is_from_handler=True)


def error(code, status=422, message="expected a video", is_from_handler=True):
    return Answer({"error": {"code": code, "message": message}}, status=status, is_from_handler=is_from_handler)


@pytest.mark.parametrize(
    "result, is_defect",
    [
        (answer(), False),
        (dataclasses.replace(answer(), status=None), False),
        (dataclasses.replace(answer(), status=500), True),
        (error("corrupt_video"), False),
        (error("corrupt_video", status=None), False),
        (error("decode_memory"), False),
        (error("corrupt_video", status=503), True),
        (error("decoder_crash"), True),
        (error("decode_timeout", status=413), True),
        (error("corrupt_video", message=f"cannot read {ROOT}/clip.mp4"), True),
        (error("corrupt_video", message="Errno 5"), True),
        (error("InternalServerException", status=422, is_from_handler=False), True),
    ],
)
def test_verdict_on_answer(result, is_defect):
    assert judge_answer(result).is_defect == is_defect


def test_same_answer_up_to_rounding():
    assert is_same_answer(answer(), answer(predictions=[{"label": "still", "score": 0.50009}]))
    assert is_same_answer(error("corrupt_video"), error("corrupt_video"))
    for other in (
        answer(predictions=[{"label": "still", "score": 0.5002}]),
        answer(predictions=[{"label": "moving", "score": 0.5}]),
        answer(video={"fps": 24.0}),
        answer(warnings=["frames repeat"]),
        error("corrupt_video"),
    ):
        assert not is_same_answer(answer(), other)


def test_verdict_on_clip(tmp_path):
    clip = load_clip(write_clip(tmp_path / "a.mp4", numbered_frames(9)), fuzz.CLIP)
    assert fuzz.judge_clip(clip) == ("answered", False)
    assert fuzz.judge_clip(NoFramesError("no frame")) == ("no_frames", False)
    for result in (
        dataclasses.replace(clip, num_frames=4),
        dataclasses.replace(clip, times_s=np.array([np.nan])),
        dataclasses.replace(clip, times_s=np.array([-1.0])),
        DecoderCrashError("no frame"),
        NoFramesError("no frame in /tmp/a"),
        ValueError("a bug"),
        MemoryError(),
    ):
        assert fuzz.judge_clip(result).is_defect


def test_decoder_fuzz_without_crashers(tmp_path):
    command = [ROOT / "scripts" / "fuzz.py", "--target", "decoder", "--count", "200", "--crashers", "crashers"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\ncrashers: 0\n" in done.stdout and not list((tmp_path / "crashers").iterdir())


def test_crashers_saved(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fuzz, "judge_clip", lambda _: fuzz.Outcome("exception: a bug", is_defect=True))
    monkeypatch.setattr(fuzz, "INTACT_EVERY", 2)
    monkeypatch.setattr(fuzz.np, "array_equal", lambda *_: False)
    files = {"a.mp4": write_clip(tmp_path / "a.mp4", numbered_frames(8)).read_bytes()}
    monkeypatch.setattr(fuzz, "make_files", lambda: files)
    monkeypatch.setattr(fuzz, "make_memory_hungry_files", dict)
    status = fuzz.main(
        ["--target", "decoder", "--seed", "5", "--first", "7", "--count", "2", "--crashers", str(tmp_path)]
    )
    assert status == 1
    for number in (7, 8):
        assert (tmp_path / f"exception-5-{number}-a.mp4").read_bytes() == make_input(files, seed=5, number=number)[1]
    output = capsys.readouterr().out
    assert "crashers: 3" in output and "intact file a.mp4: different pixels" in output


def test_decoder_that_keeps_memory_reported(monkeypatch):
    settings = DecoderSettings.from_options(fuzz.OPTIONS, clip=fuzz.CLIP)
    monkeypatch.setattr(DecoderSettings, "max_growth_bytes", 2**40)
    pool = DecoderPool(settings, processes=1)
    try:
        pool.load_clips([make_memory_hungry_files()["many_streams.ts"]])
        assert check_growth(psutil.Process().children(), settings) == []
        monkeypatch.setattr(DecoderSettings, "max_growth_bytes", 2**29)
        (complaint,) = check_growth(psutil.Process().children(), settings)
        assert "more than 537 MB" in complaint
    finally:
        pool.close()


def test_memory_slope():
    samples = [
        soak.Sample(
            requests=number,
            rss_bytes={"worker": 10**8 + 250 * number},
            decoder_growth_bytes=0,
            descriptors={},
            temporary_files=0,
        )
        for number in range(0, 5000, 100)
    ]
    assert np.isclose(soak.memory_slope(samples, "worker"), 250)


def test_short_soak_without_complaints(server, monkeypatch):
    monkeypatch.setattr(soak, "IDLE_S", 1.0)
    monkeypatch.setattr(soak, "SAMPLE_INTERVAL_S", 0.1)
    report = soak.soak(server, requests=200, threads=4)
    assert report["complaints"] == []
    assert sum(count for *_, count in report["outcomes"]) == report["requests"] == 200
    assert report["after"]["rss_bytes"].keys() == {"server", "worker", "decoders"}
    assert min(report["after"]["descriptors"].values()) > 0 and len(report["samples"]) > 1
    assert "200 requests, seed 0, 4 clients" in soak.format_report(json.loads(json.dumps(report)))
