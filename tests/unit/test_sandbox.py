"""Decoding in processes of their own: the same clips, and files that kill a process cost nobody else anything."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from handler.clips import ClipSettings, load_clip
from handler.processing.resize import ResizeCrop
from handler.sandbox import pool as sandbox
from handler.sandbox.pool import (
    DecodeMemoryError,
    DecoderCrashError,
    DecoderPool,
    DecoderSettings,
    DecodeTimeoutError,
    _Decoder,
)
from handler.video import Limits
from tests.support.clips import numbered_frames, write_clip

ROOT = Path(__file__).resolve().parents[2]
CLIP = ClipSettings(num_frames=8, resize_crop=ResizeCrop(resize_to=40, resample=2, crop_to=(32, 32)))


def settings(*, max_decode_s=60, max_memory_bytes=2**31):
    return DecoderSettings(clip=CLIP, max_decode_s=max_decode_s, max_memory_bytes=max_memory_bytes)


@pytest.fixture(scope="module")
def pool():
    pool = DecoderPool(settings(), processes=2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [
        write_clip(folder / "a.mp4", numbered_frames(30, seed=1)).read_bytes(),
        write_clip(folder / "b.webm", numbered_frames(3, height=90, width=64), codec="libvpx").read_bytes(),
        write_clip(folder / "c.mkv", numbered_frames(12, height=48, width=48, seed=3)).read_bytes(),
    ]


@pytest.fixture(scope="module")
def large_video(tmp_path_factory):
    """Takes more than a tenth of a second and of a gigabyte to decode."""
    frames = numbered_frames(8, height=2160, width=3840)
    path = tmp_path_factory.mktemp("large") / "large.mp4"
    return write_clip(path, frames, options={"preset": "ultrafast"}).read_bytes()


def decoder_pids(pool):
    """The processes of an idle pool."""
    decoders = [pool._idle.get() for _ in range(pool.processes)]
    for decoder in decoders:
        pool._idle.put(decoder)
    return [decoder._process.pid for decoder in decoders]


def test_clips_are_those_that_the_worker_would_have_made_itself(pool, videos):
    for video, clip in zip(videos, pool.load_clips(videos)):
        expected = load_clip(video, CLIP)
        np.testing.assert_array_equal(clip.pixels, expected.pixels)
        np.testing.assert_array_equal(clip.times_s, expected.times_s)
        assert (clip.info, clip.warnings) == (expected.info, expected.warnings)


def test_more_files_than_processes_come_back_in_their_order(pool, videos):
    clips = pool.load_clips(videos * 5)
    assert [clip.info.frame_count for clip in clips] == [30, 3, 12] * 5


def test_no_files_give_no_clips(pool):
    assert pool.load_clips([]) == []


def test_a_broken_file_is_an_error_in_its_own_place(pool, videos):
    clips = pool.load_clips([videos[0], b"no video", b"", videos[2]])
    assert [getattr(clip, "code", None) for clip in clips] == [None, "not_a_video", "not_a_video", None]
    assert "got something else" in str(clips[1])


def test_a_file_that_takes_too_long_is_stopped_and_the_next_one_is_served(videos, large_video):
    pool = DecoderPool(settings(max_decode_s=0.05), processes=1)
    started = time.monotonic()
    (error,) = pool.load_clips([large_video])
    assert isinstance(error, DecodeTimeoutError)
    assert time.monotonic() - started < 30
    (clip,) = pool.load_clips([videos[2]])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)
    pool.close()


def test_a_file_that_needs_too_much_memory_is_refused_and_the_next_one_is_served(videos, large_video):
    pool = DecoderPool(settings(max_memory_bytes=50 * 2**20), processes=1)
    (error,) = pool.load_clips([large_video])
    assert error.code == DecodeMemoryError.code and "50 MiB" in str(error)
    (clip,) = pool.load_clips([videos[0]])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)
    pool.close()


def test_a_file_is_not_refused_for_the_memory_that_another_one_has_used_up(videos, monkeypatch):
    pool = DecoderPool(settings(), processes=1)
    pool.load_clips([videos[0]])
    (pid,) = decoder_pids(pool)
    load = _Decoder.load

    def find_no_memory_in_the_first_process(decoder, source, threads):
        if decoder._process.pid == pid:
            decoder.stop()
            raise DecodeMemoryError("no memory left")
        return load(decoder, source, threads)

    monkeypatch.setattr(_Decoder, "load", find_no_memory_in_the_first_process)
    (clip,) = pool.load_clips([videos[0]])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)
    pool.close()


def test_a_process_without_memory_is_not_used_again(videos, large_video):
    pool = DecoderPool(settings(max_memory_bytes=50 * 2**20), processes=1)
    (pid,) = decoder_pids(pool)
    pool.load_clips([large_video])
    assert decoder_pids(pool) != [pid]
    pool.close()


def test_many_threads_do_not_use_up_the_address_space(videos):
    pool = DecoderPool(settings(max_memory_bytes=2**30), processes=1)
    pool._load(videos[0], 16)
    (pid,) = decoder_pids(pool)
    for _ in range(3):
        assert pool._load(videos[0], 16).pixels.shape == (1, 8, 3, 32, 32)
    assert decoder_pids(pool) == [pid]
    pool.close()


def test_a_file_gets_no_more_threads_than_there_is_memory_for(monkeypatch):
    pool = DecoderPool(settings(), processes=1, threads=64)
    monkeypatch.setattr(pool, "_load", lambda source, threads: threads)
    assert pool.load_clips([b""]) == [16]
    assert pool.load_clips([b""] * 8) == [8] * 8
    monkeypatch.undo()
    pool.close()


def test_a_process_that_a_file_kills_is_replaced(videos, large_video):
    pool = DecoderPool(settings(), processes=1)
    (pid,) = decoder_pids(pool)
    os.kill(pid, signal.SIGSTOP)  # so that it is surely at work when it is killed
    future = pool._threads.submit(pool._load, large_video, 1)
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    assert isinstance(future.result(timeout=60), DecoderCrashError)
    (clip,) = pool.load_clips([videos[0]])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)
    assert decoder_pids(pool) != [pid]
    pool.close()


def test_a_process_that_died_while_idle_is_replaced(videos):
    pool = DecoderPool(settings(), processes=1)
    (pid,) = decoder_pids(pool)
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)], timeout=10)
    (clip,) = pool.load_clips([videos[0]])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)
    pool.close()


def test_closing_ends_all_processes(videos):
    pool = DecoderPool(settings(), processes=2)
    pids = decoder_pids(pool)
    pool.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_decoders_end_with_their_worker_even_if_it_is_killed():
    code = (
        "import time; from handler.processing.resize import ResizeCrop; from handler.sandbox.pool import *\n"
        "g = ResizeCrop(resize_to=40, resample=2, crop_to=(32, 32))\n"
        "c = ClipSettings(num_frames=8, resize_crop=g)\n"
        "s = DecoderSettings(clip=c, max_decode_s=60, max_memory_bytes=2**31)\n"
        "pool = DecoderPool(s, processes=2); pool.load_clips([b''] * 2); print(flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    worker.stdout.readline()
    decoders = psutil.Process(worker.pid).children()
    worker.kill()
    worker.communicate()
    _, alive = psutil.wait_procs(decoders, timeout=10)
    assert len(decoders) == 2 and not alive


def test_a_decoder_process_loads_no_torch():
    code = "import sys, handler.sandbox; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_settings_survive_the_way_to_the_process():
    whole = ResizeCrop(resize_to=(30, 40), resample=3, crop_to=None)
    limits = Limits(max_duration_s=1.5, max_frame_pixels=100, max_frames=10)
    for clip in (CLIP, ClipSettings(num_frames=4, resize_crop=whole, limits=limits, sampling="keyframes")):
        original = DecoderSettings(clip=clip, max_decode_s=1.5, max_memory_bytes=2**30)
        assert DecoderSettings.from_json(original.to_json()) == original


def test_the_memory_that_libraries_take_is_not_counted_as_a_files(pool):
    (pid, *_) = decoder_pids(pool)
    process = psutil.Process(pid)
    limit, _ = process.rlimit(psutil.RLIMIT_AS)
    assert 2**31 < limit <= 2**31 + process.memory_info().vms


@pytest.mark.parametrize("is_fast", [False, True])
def test_a_decoder_process_makes_the_same_clips_whichever_way_it_resizes(videos, large_video, is_fast):
    clip = dataclasses.replace(CLIP, resize_crop=dataclasses.replace(CLIP.resize_crop, is_fast=is_fast))
    pool = DecoderPool(dataclasses.replace(settings(), clip=clip), processes=1)
    for video in (*videos, large_video):
        (made,) = pool.load_clips([video])
        np.testing.assert_array_equal(made.pixels, load_clip(video, clip).pixels)
    pool.close()


def test_a_process_that_cannot_be_started_costs_one_file_and_is_started_later(videos, monkeypatch):
    pool = DecoderPool(settings(), processes=1)
    (pid,) = decoder_pids(pool)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", raising(OSError("no process")))
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
        (error,) = pool.load_clips(videos[:1])
        assert isinstance(error, (OSError, DecoderCrashError))
    (clip,) = pool.load_clips(videos[:1])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)
    pool.close()


def test_after_half_a_reply_the_process_is_not_used_again(videos, monkeypatch):
    pool = DecoderPool(settings(), processes=1)
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_receive", raising(MemoryError()))
        (error,) = pool.load_clips(videos[:1])
        assert isinstance(error, MemoryError)
    (clip,) = pool.load_clips(videos[1:2])
    np.testing.assert_array_equal(clip.pixels, load_clip(videos[1], CLIP).pixels)
    pool.close()


def raising(error):
    def function(*args, **options):
        raise error

    return function
