"""Decoding in separate processes: equal results, limits, crashes and messages."""

import contextlib
import dataclasses
import json
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from handler.clips import Clip, ClipSettings, load_clip
from handler.options import HandlerOptions
from handler.processing.resize import ResizeCrop
from handler.sandbox import (
    DecodeMemoryError,
    DecoderCrashError,
    DecoderPool,
    DecoderSettings,
    DecodeTimeoutError,
    wire,
)
from handler.sandbox import (
    pool as pool_module,
)
from handler.video import Limits, NotAVideoError, VideoError
from tests.support.clips import numbered_frames, write_clip

ROOT = Path(__file__).resolve().parents[2]
CLIP = ClipSettings(num_frames=8, resize_crop=ResizeCrop(resize_to=40, resample=2, crop_to=(32, 32)))
FAST_CLIP = dataclasses.replace(CLIP, resize_crop=dataclasses.replace(CLIP.resize_crop, is_fast=True))
SLOW_CLIP = ClipSettings(num_frames=16, resize_crop=ResizeCrop(resize_to=1000, resample=1, crop_to=None))


def settings(clip=CLIP, **options) -> DecoderSettings:
    return DecoderSettings.from_options(HandlerOptions(**options), clip=clip)


@contextlib.contextmanager
def decoder_pool(decoder_settings=settings(), *, processes=1, threads=None):
    """Yields a pool and a function that returns its processes."""
    others = set(psutil.Process().children())
    pool = DecoderPool(decoder_settings, processes=processes, threads=threads)
    try:
        yield pool, lambda: [child for child in psutil.Process().children() if child not in others]
    finally:
        pool.close()


@pytest.fixture(scope="module")
def shared_pool():
    with decoder_pool() as (pool, processes):
        yield pool, processes


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [
        write_clip(folder / "a.mp4", numbered_frames(30, seed=1)).read_bytes(),
        write_clip(folder / "b.webm", numbered_frames(3, height=90, width=64), codec="libvpx").read_bytes(),
        write_clip(folder / "c.mkv", numbered_frames(12, height=48, width=48, seed=3)).read_bytes(),
    ]


@pytest.fixture(scope="module")
def video(videos):
    return videos[0]


@pytest.fixture(scope="module")
def large_video(tmp_path_factory):
    """Frames of 25 MB each in a file of a few kB."""
    frames = np.broadcast_to(np.uint8(90), (16, 2160, 3840, 3))
    return write_clip(tmp_path_factory.mktemp("large") / "a.mp4", frames, options={"preset": "ultrafast"}).read_bytes()


def load_or_error(source, clip_settings):
    try:
        return load_clip(source, clip_settings)
    except VideoError as error:
        return error


def assert_same_results(results, expected):
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected):
        assert (type(result), str(result)[:30]) == (type(wanted), str(wanted)[:30])
        if isinstance(wanted, Clip):
            np.testing.assert_array_equal(result.pixels, wanted.pixels)
            np.testing.assert_array_equal(result.times_s, wanted.times_s)
            assert (result.info, result.warnings) == (wanted.info, wanted.warnings)
            assert result.decoded_frames > 0 and result.decode_s > 0  # depends on the number of threads
        else:
            assert str(result) == str(wanted)


# The fast resize imports torch, whose memory does not count against the limit.
@pytest.mark.parametrize(
    "clip_settings, processes, options",
    [(CLIP, 2, {}), (FAST_CLIP, 1, {"max_decode_memory_bytes": 2**28})],
    ids=["exact", "fast"],
)
def test_results_equal_those_in_process(videos, large_video, clip_settings, processes, options, capfd):
    sources = [*videos, b"no video", large_video, b"", *videos]
    with decoder_pool(settings(clip_settings, **options), processes=processes) as (pool, running):
        results = pool.load_clips(sources)
        loads_torch = any("libtorch" in library.path for library in running()[0].memory_maps())
        assert pool.load_clips([]) == []
        assert len(running()) == processes
        pool.close()
        assert not running()
    assert_same_results(results, [load_or_error(source, clip_settings) for source in sources])
    assert loads_torch == clip_settings.resize_crop.is_fast
    assert capfd.readouterr() == ("", "")


# Limits


def test_timeout(large_video):
    with decoder_pool(settings(SLOW_CLIP, max_decode_s=0.2)) as (pool, processes):
        before = processes()
        (error,) = pool.load_clips([b"no video"])
        assert isinstance(error, NotAVideoError)
        time.sleep(0.3)
        assert processes() == before  # the limit applies to each video, not to the process
        (error,) = pool.load_clips([large_video])
        assert isinstance(error, DecodeTimeoutError) and "0.2 s" in str(error)
        (error,) = pool.load_clips([b"no video"])
        assert isinstance(error, NotAVideoError)


def test_stopped_process_times_out(video, monkeypatch):
    monkeypatch.setattr(pool_module, "TRANSFER_TIMEOUT_S", 0.1)
    with decoder_pool(settings(max_decode_s=0.1)) as (pool, processes):
        pool.load_clips([b"no video"])
        (stopped,) = processes()
        stopped.suspend()
        (error,) = pool.load_clips([video])
        assert isinstance(error, DecodeTimeoutError)
        assert stopped not in processes()


def test_memory_limit(video, large_video):
    with decoder_pool(settings(max_decode_memory_bytes=2**26)) as (pool, processes):
        # A video that needs too much memory when it is decoded, when it is copied, and when it is received.
        for source in (large_video, bytes(2**26 - 2**20), bytes(2**26 + 1)):
            before = processes()
            (error,) = pool.load_clips([source])
            assert isinstance(error, DecodeMemoryError) and "64 MiB" in str(error)
            assert processes() != before
        (clip,) = pool.load_clips([video])
        assert clip.pixels.shape == (1, 8, 3, 32, 32)


def test_memory_limit_excludes_earlier_videos(shared_pool, video, large_video):
    pool, processes = shared_pool
    pool.load_clips([video])
    (process,) = processes()
    limit = process.memory_info().vms + 2**23
    process.rlimit(psutil.RLIMIT_AS, (limit, limit))
    (clip,) = pool.load_clips([large_video])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)
    assert processes() != [process]


def test_threads_shared_by_files_within_memory_limit(video, monkeypatch):
    requested = []

    def record(connection, header, payload=b"", **options):
        requested.append(header["threads"])
        send(connection, header, payload, **options)

    send = wire.send_message
    monkeypatch.setattr(pool_module, "send_message", record)
    with decoder_pool(settings(max_decode_memory_bytes=2**30), threads=16) as (pool, processes):
        before = processes()
        results = pool.load_clips([video]) + pool.load_clips([video]) + pool.load_clips([video] * 4)
        assert processes() == before
    assert requested == [16, 16, 4, 4, 4, 4]
    assert_same_results(results, [load_clip(video, CLIP)] * 6)


# Crashes


def test_process_killed_while_idle(shared_pool, video):
    pool, processes = shared_pool
    (process,) = processes()
    process.kill()
    process.wait()
    (clip,) = pool.load_clips([video])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)


def test_process_killed_while_decoding(shared_pool, video, monkeypatch):
    pool, processes = shared_pool
    pool.load_clips([b""])
    (process,) = processes()

    def send_and_kill(*args, **options):
        process.suspend()
        send(*args, **options)
        process.kill()

    send = wire.send_message
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "send_message", send_and_kill)
        (error,) = pool.load_clips([video])
    assert isinstance(error, DecoderCrashError)
    (clip,) = pool.load_clips([video])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)


@pytest.mark.parametrize("error, expected", [(MemoryError(), MemoryError), (wire.MessageError(), DecoderCrashError)])
def test_process_replaced_after_incomplete_reply(shared_pool, videos, monkeypatch, error, expected):
    pool, _ = shared_pool
    pool.load_clips([b""])
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "receive_message", raising(error))
        (result,) = pool.load_clips(videos[:1])
    assert isinstance(result, expected)
    assert_same_results(pool.load_clips(videos[1:2]), [load_clip(videos[1], CLIP)])


def test_failed_start_reported_and_repeated(video, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        pool = DecoderPool(settings(), processes=1)
        (error,) = pool.load_clips([video])
        assert isinstance(error, RuntimeError) and "failed to start: exit status 1" in str(error)
        patch.setattr(subprocess, "Popen", raising(OSError("no process")))
        (error,) = pool.load_clips([video])
        assert str(error) in ("no process", "a decoder process failed to start: exit status 1")
        (error,) = pool.load_clips([video])
        assert str(error) == "no process"
    (clip,) = pool.load_clips([video])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)
    pool.close()


def test_invalid_start_message_is_not_the_files_fault(video, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "receive_message", raising(wire.MessageError()))
        pool = DecoderPool(settings(), processes=1)
        (error,) = pool.load_clips([video])
    assert isinstance(error, RuntimeError) and "failed to start" in str(error)
    (clip,) = pool.load_clips([video])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)
    pool.close()


def test_processes_exit_with_killed_worker():
    code = (
        "import time; from handler.clips import *; from handler.sandbox import *\n"
        "clip = ClipSettings(num_frames=8, resize_crop=ResizeCrop(resize_to=40, resample=2, crop_to=None))\n"
        "settings = DecoderSettings(clip=clip, max_decode_s=60, max_memory_bytes=2**31)\n"
        "pool = DecoderPool(settings, processes=1); pool.load_clips([b'']); print(flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    worker.stdout.readline()
    processes = psutil.Process(worker.pid).children()
    worker.kill()
    worker.communicate()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert len(processes) == 1 and not alive


# Messages


@pytest.fixture
def connections():
    first, second = socket.socketpair()
    with first, second:
        yield first, second


def test_settings_from_options_survive_json():
    whole = ResizeCrop(resize_to=(30, 40), resample=3, crop_to=None)
    limits = Limits(max_duration_s=1.5, max_frame_pixels=100, max_frames=10)
    clip = ClipSettings(num_frames=4, resize_crop=whole, limits=limits, sampling="keyframes")
    original = settings(clip, max_decode_s=1.5, max_decode_memory_bytes=2**30)
    assert (original.clip, original.max_decode_s, original.max_memory_bytes) == (clip, 1.5, 2**30)
    assert wire.rebuild(DecoderSettings, json.loads(wire.to_json(original))) == original


def test_clip_unchanged_by_wire_format(connections, video):
    sender, receiver = connections
    clip = load_clip(video, CLIP)
    wire.send_result(sender, clip)
    received = wire.read_result(*wire.receive_message(receiver, max_payload_bytes=2**20))
    for name in ("pixels", "times_s"):
        expected, found = getattr(clip, name), getattr(received, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert (received.info, received.warnings) == (clip.info, clip.warnings)


def test_errors_keep_class_and_message(connections):
    sender, receiver = connections
    classes = [VideoError]
    for error_class in classes:
        classes += error_class.__subclasses__()
    for error_class in classes:
        wire.send_result(sender, error_class("a cause"))
        result = wire.read_result(*wire.receive_message(receiver, max_payload_bytes=0))
        assert (type(result), str(result)) == (error_class, "a cause")
    wire.send_result(sender, ZeroDivisionError("a bug"))
    result = wire.read_result(*wire.receive_message(receiver, max_payload_bytes=0))
    assert type(result) is RuntimeError and "ZeroDivisionError: a bug" in str(result)


@pytest.mark.parametrize(
    "data, expected",
    [
        (struct.pack(">QQ", 2, 101) + b"{}", "at most 1048576 header bytes and 100 payload bytes, got 2 and 101"),
        (struct.pack(">QQ", 2**63, 0), "got 9223372036854775808 and 0"),
        (struct.pack(">QQ", 2, 0) + b"[]", "JSON object"),
        (struct.pack(">QQ", 2, 0) + b"{!", "JSON"),
        (struct.pack(">QQ", 2, 0) + b"{}", "a clip, an error or a failure"),
        (struct.pack(">QQ", 12, 0) + b'{"error": 1}', "a clip, an error or a failure"),
        (struct.pack(">QQ", 39, 0) + b'{"error": {"code": "x", "message": ""}}', "no VideoError has the code 'x'"),
        (struct.pack(">QQ", 27, 2) + b'{"clip": {"pixels": [1, 3]}}'[:27] + b"}}", "JSON"),
        (struct.pack(">QQ", 28, 2) + b'{"clip": {"pixels": [1, 3]}}' + b"\0\0", "a clip, an error or a failure"),
    ],
)
def test_invalid_messages_rejected(connections, data, expected):
    sender, receiver = connections
    sender.sendall(data)
    with pytest.raises(wire.MessageError, match=expected):
        wire.read_result(*wire.receive_message(receiver, max_payload_bytes=100))


def test_no_wait_beyond_deadline_or_closed_connection(connections):
    sender, receiver = connections
    for deadline_s in (time.monotonic() - 1, time.monotonic() + 0.05):
        sender.sendall(b"\0")
        with pytest.raises(TimeoutError):
            wire.receive_message(receiver, max_payload_bytes=0, deadline_s=deadline_s)
        with pytest.raises(TimeoutError):
            wire.send_message(sender, {}, bytes(2**24), deadline_s=deadline_s)
    sender.close()
    with pytest.raises(EOFError):
        wire.receive_message(receiver, max_payload_bytes=2**62)


def raising(error):
    def function(*args, **options):
        raise error

    return function
