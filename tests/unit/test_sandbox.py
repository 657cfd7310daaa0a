"""Decoding in separate processes: equal results, limits, crashes and messages."""

import contextlib
import dataclasses
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import types

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
    DecodersBusyError,
    DecoderSettings,
    DecodeTimeoutError,
    replies,
    wire,
)
from handler.sandbox import (
    pool as pool_module,
)
from handler.video import Limits, NotAVideoError, Postponed, VideoError
from handler.views import ONE_VIEW, Views
from tests.support.clips import numbered_frames, write_clip

CLIP = ClipSettings(num_frames=8, resize_crop=ResizeCrop(resize_to=40, resample=2, crop_to=(32, 32)))
FAST_CLIP = dataclasses.replace(CLIP, resize_crop=dataclasses.replace(CLIP.resize_crop, is_fast=True))
NINE_VIEWS = Views(clips=3, crops=3, sampling="dense", stride_frames=2)
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
    """Frames of 25 MB each in a file of a few kB: 0.066 gigapixels."""
    frames = np.broadcast_to(np.uint8(90), (8, 2160, 3840, 3))
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
    options = {"max_decode_s": 100, "max_batch_decode_s": 100, **options}  # for machines under load
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


@pytest.mark.parametrize("is_idle", [True, False])
def test_stopped_process_replaced(video, monkeypatch, is_idle):
    monkeypatch.setattr(pool_module, "TRANSFER_TIMEOUT_S", 0.3)
    with decoder_pool(settings(max_decode_s=0.5)) as (pool, processes):
        pool.load_clips([b"no video"])
        (stopped,) = processes()
        if is_idle:
            stopped.suspend()
        else:
            signal_after_receipt(monkeypatch, processes, [signal.SIGSTOP])
        (clip,) = pool.load_clips([video])
        assert_same_results([clip], [load_clip(video, CLIP)])
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


def test_process_with_grown_address_space_replaced(shared_pool, video, monkeypatch):
    pool, processes = shared_pool
    pool.load_clips([video])
    before = processes()
    monkeypatch.setattr(DecoderSettings, "max_growth_bytes", 2**20)
    pool.load_clips([video])
    after = processes()
    assert len(before) == len(after) == 1 and before != after
    assert_same_results(pool.load_clips([video]), [load_clip(video, CLIP)])


@pytest.mark.parametrize("limit, replaced", [(0, [False] * 3), (1, [True] * 2), (2, [False, True])])
def test_process_replaced_after_number_of_videos(video, limit, replaced):
    with decoder_pool(settings(max_videos_per_decoder=limit)) as (pool, processes):
        for is_replaced in replaced:
            before = processes()
            (clip,) = pool.load_clips([video])
            assert isinstance(clip, Clip)
            assert (processes() != before) == is_replaced


def test_threads_start_before_first_video_and_none_are_left(video):
    with decoder_pool(threads=16) as (pool, processes):
        pool.confinement()  # waits until the process is ready
        (process,) = processes()
        idle, sizes = process.num_threads(), []
        assert idle > 1
        for _ in range(3):
            pool.load_clips([video])
            sizes.append(process.memory_info().vms)
            assert process.num_threads() == idle
        assert max(sizes) < min(sizes) + 2**26


def test_expensive_files_last_and_limited_by_deadline(video, large_video, monkeypatch):
    limits = Limits(max_decode_gigapixels=0.4)
    requests = []
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 1000 * len(requests[4:]), sleep=time.sleep)

    def record(connection, header, payload=b"", **options):
        requests.append((payload, header["postpone_above_gigapixels"]))
        wire.send_message(connection, header, payload, **options)

    with decoder_pool(settings(dataclasses.replace(CLIP, limits=limits), max_batch_decode_s=100)) as (pool, _):
        monkeypatch.setattr(pool_module, "send_message", record)
        monkeypatch.setattr(pool_module, "time", clock)  # each request after the first four takes 1000 s
        results = pool.load_clips([large_video, video, large_video, video])
        (alone,) = pool.load_clips([large_video])
    assert [type(result) for result in results] == [Clip, Clip, DecodersBusyError, Clip]
    assert isinstance(alone, Clip)
    assert sorted(requests[:4]) == sorted([(video, 0.05)] * 2 + [(large_video, 0.05)] * 2)
    assert requests[4:] == [(large_video, None)] * 2


def test_videos_with_much_cpu_time_last(large_video, monkeypatch):
    monkeypatch.setattr(pool_module, "CHEAP_CPU_S", 0.1)
    monkeypatch.setattr(pool_module, "CHEAP_BATCH_FRACTION", 0)
    requests = []

    def record(connection, header, payload=b"", **options):
        requests.append((payload, header["max_cpu_s"]))
        wire.send_message(connection, header, payload, **options)

    monkeypatch.setattr(pool_module, "send_message", record)
    with decoder_pool(settings(SLOW_CLIP)) as (pool, _):
        slow, fast = pool.load_clips([large_video, b"no video"])
    assert isinstance(slow, Clip) and isinstance(fast, NotAVideoError)
    assert requests == [(b"no video", 0.1), (large_video, 0.1), (large_video, None)]


def test_cheap_videos_share_remaining_time_of_batch(video, monkeypatch):
    limits_s = []

    def record(connection, header, payload=b"", **options):
        limits_s.append(header["max_cpu_s"])
        wire.send_message(connection, header, payload, **options)

    monkeypatch.setattr(pool_module, "send_message", record)
    with decoder_pool(settings(max_batch_decode_s=1000)) as (pool, _):
        pool.load_clips([video] * 4)
        assert limits_s == pytest.approx([200, 800 / 3, 400, 800], rel=0.03)
        pool.load_clips([video])
        assert limits_s[4:] == [None]


def test_time_of_batch_limits_running_video(large_video):
    with decoder_pool(settings(SLOW_CLIP, max_batch_decode_s=0.2)) as (pool, _):
        pool.load_clips([b"no video"])
        results = pool.load_clips([large_video] * 2)
        assert [type(result) for result in results] == [DecodersBusyError] * 2
        (alone,) = pool.load_clips([large_video])
        assert isinstance(alone, Clip)


# Crashes


def test_process_killed_while_idle(shared_pool, video):
    pool, processes = shared_pool
    (process,) = processes()
    process.kill()
    process.wait()
    (clip,) = pool.load_clips([video])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)


@pytest.mark.parametrize(
    "signals, expected",
    [
        ([signal.SIGKILL], Clip),
        ([signal.SIGKILL] * 2, RuntimeError),
        ([signal.SIGSEGV], Clip),
        ([signal.SIGSEGV, signal.SIGKILL], RuntimeError),
        ([signal.SIGSEGV] * 2, DecoderCrashError),
        ([signal.SIGALRM], Clip),
        ([signal.SIGALRM] * 2, RuntimeError),
        ([signal.SIGPROF], Clip),
    ],
)
def test_crash_error_only_after_two_crashes(shared_pool, video, monkeypatch, signals, expected):
    pool, processes = shared_pool
    with monkeypatch.context() as patch:
        signal_after_receipt(patch, processes, signals)
        (result,) = pool.load_clips([video])
    assert type(result) is expected
    assert_same_results(pool.load_clips([video]), [load_clip(video, CLIP)])


def test_no_video_error_after_exit_before_receipt(shared_pool, video, monkeypatch):
    pool, processes = shared_pool

    def crash_and_send(*args, **options):
        (process,) = processes()
        process.send_signal(signal.SIGSEGV)
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        send(*args, **options)

    send = wire.send_message
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "send_message", crash_and_send)
        (error,) = pool.load_clips([video])
    assert type(error) is RuntimeError and "SIGSEGV" in str(error)


@pytest.mark.parametrize("count, expected", [(1, Clip), (2, DecoderCrashError)])
def test_process_replaced_after_invalid_reply(shared_pool, videos, monkeypatch, count, expected):
    pool, _ = shared_pool
    errors = [wire.MessageError()] * count

    def read(*args):
        if errors:
            raise errors.pop()
        return replies.read_result(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "read_result", read)
        (result,) = pool.load_clips(videos[:1])
    assert type(result) is expected
    assert_same_results(pool.load_clips(videos[1:2]), [load_clip(videos[1], CLIP)])


def test_process_replaced_after_incomplete_reply(shared_pool, videos, monkeypatch):
    pool, _ = shared_pool
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "read_result", raising(MemoryError()))
        (result,) = pool.load_clips(videos[:1])
    assert isinstance(result, MemoryError)
    assert_same_results(pool.load_clips(videos[1:2]), [load_clip(videos[1], CLIP)])


def test_failed_start_reported_and_repeated(video, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        pool = DecoderPool(settings(), processes=1)
        (error,) = pool.load_clips([video])
        assert isinstance(error, RuntimeError) and "failed to start: exit status 1" in str(error)
        patch.setattr(subprocess, "Popen", raising(OSError("no process")))
        (error,) = pool.load_clips([video])
        assert "no process" in str(error) or "failed to start: exit status 1" in str(error)
        (error,) = pool.load_clips([video])
        assert str(error) == "no process"
    (clip,) = pool.load_clips([video])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)
    pool.close()


@pytest.mark.parametrize("kills, expected", [(1, Clip), (2, RuntimeError)])
def test_process_killed_while_starting(video, monkeypatch, kills, expected):
    remaining = [signal.SIGKILL] * kills

    def kill_and_receive(*args, **options):
        if remaining:
            processes()[0].send_signal(remaining.pop())
        return wire.receive_message(*args, **options)

    with decoder_pool() as (pool, processes):
        monkeypatch.setattr(pool_module, "receive_message", kill_and_receive)
        (result,) = pool.load_clips([video])
        assert type(result) is expected


def test_start_without_memory_costs_no_process(shared_pool, video, monkeypatch):
    pool, processes = shared_pool
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", raising(MemoryError()))
        processes()[0].kill()
        (error,) = pool.load_clips([video])
    assert isinstance(error, MemoryError)
    assert_same_results(pool.load_clips([video]), [load_clip(video, CLIP)])


def test_no_video_error_after_invalid_start_message(video, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "receive_message", raising(wire.MessageError()))
        pool = DecoderPool(settings(), processes=1)
        (error,) = pool.load_clips([video])
    assert isinstance(error, RuntimeError) and "failed to start" in str(error)
    (clip,) = pool.load_clips([video])
    assert clip.pixels.shape == (1, 8, 3, 32, 32)
    pool.close()


# Messages


@pytest.fixture
def connections():
    first, second = socket.socketpair()
    with first, second:
        yield first, second


def test_settings_from_options_survive_json():
    whole = ResizeCrop(resize_to=(30, 40), resample=3, crop_to=None)
    limits = Limits(max_duration_s=1.5, max_frame_pixels=100, max_frames=10)
    clip = ClipSettings(num_frames=4, resize_crop=whole, limits=limits, video_stream="best")
    original = settings(clip, max_decode_s=1.5, max_decode_memory_bytes=2**30)
    assert (original.clip, original.max_decode_s, original.max_memory_bytes) == (clip, 1.5, 2**30)
    assert wire.rebuild(DecoderSettings, json.loads(wire.to_json(original))) == original


def send_and_read(connections, result, views=ONE_VIEW):
    sender, receiver = connections
    wire.send_message(sender, *replies.to_message(result))
    message = wire.receive_message(receiver, max_payload_bytes=replies.max_payload_bytes(CLIP, views))
    return replies.read_result(*message, CLIP, views)


@pytest.mark.parametrize("views", [ONE_VIEW, NINE_VIEWS], ids=["one view", "nine views"])
def test_clip_unchanged_by_wire_format(connections, video, views):
    clip = load_clip(video, CLIP, views=views)
    received = send_and_read(connections, clip, views)
    for name in ("pixels", "frame_indices", "times_s"):
        expected, found = getattr(clip, name), getattr(received, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert (received.info, received.crops, received.warnings) == (clip.info, clip.crops, clip.warnings)


def test_views_of_each_video_of_a_batch(videos):
    chosen = [NINE_VIEWS, ONE_VIEW, Views(start_s=0.2)]
    with decoder_pool(processes=2) as (pool, _):
        results = pool.load_clips(videos[:3], views=chosen)
    assert_same_results(results, [load_clip(video, CLIP, views=views) for video, views in zip(videos, chosen)])


def test_errors_keep_class_and_message(connections):
    classes = [VideoError]
    for error_class in classes:
        classes += error_class.__subclasses__()
    for error_class in classes:
        result = send_and_read(connections, error_class("a cause"))
        assert (type(result), str(result)) == (error_class, "a cause")
    result = send_and_read(connections, ZeroDivisionError("a bug"))
    assert type(result) is RuntimeError and "ZeroDivisionError: a bug" in str(result)
    result = send_and_read(connections, Postponed(1.5))
    assert type(result) is Postponed and result.gigapixels == 1.5


def test_text_of_replies_bounded_and_printable(connections, video):
    hostile = "\r\n[METRICS]x\0\x1b\ud800" + "y" * 10_000
    printable = "??[METRICS]x???" + "y" * 485
    clip = dataclasses.replace(load_clip(video, CLIP), warnings=(hostile,))
    assert send_and_read(connections, clip).warnings == (printable,)
    assert str(send_and_read(connections, VideoError(hostile))) == printable
    failure = str(send_and_read(connections, ZeroDivisionError("\r\n[METRICS]x\x1b" * 10_000)))
    assert len(failure) < 50_000 and "\x1b" not in failure and "\n[METRICS]" not in failure


@pytest.mark.parametrize(
    "data, expected",
    [
        (struct.pack(">QQ", 2, 101) + b"{}", "at most 1048576 header bytes and 100 payload bytes, got 2 and 101"),
        (struct.pack(">QQ", 2**63, 0), "got 9223372036854775808 and 0"),
        (struct.pack(">QQ", 2, 0) + b"[]", "JSON object"),
        (struct.pack(">QQ", 2, 0) + b"{!", "JSON"),
        (struct.pack(">QQ", 2, 0) + b"\xff!", "JSON"),
        (struct.pack(">QQ", 9, 0) + b'{"a":NaN}', "NaN is not JSON"),
        (struct.pack(">QQ", 10**5, 0) + b"[" * 10**5, "JSON"),
    ],
)
def test_invalid_messages_rejected(connections, data, expected):
    sender, receiver = connections
    sender.sendall(data)
    with pytest.raises(wire.MessageError, match=expected):
        wire.receive_message(receiver, max_payload_bytes=100)


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"ready": True},
        {"error": 1},
        {"error": {}},
        {"error": {"code": "unknown", "message": ""}},
        {"error": {"code": "corrupt_video\r\n", "message": ""}},
        {"error": {"code": ["corrupt_video"], "message": ""}},
        {"error": {"code": "corrupt_video", "message": 1}},
        {"error": {"code": "corrupt_video", "message": "", "status": 200}},
        {"failure": ["text"]},
        {"postponed": {"gigapixels": "1"}},
        {"postponed": {"gigapixels": -1}},
        {"postponed": {}},
        {"clip": []},
        {"clip": {}},
    ],
    ids=str,
)
def test_invalid_replies_rejected(header):
    with pytest.raises(wire.MessageError):
        replies.read_result(header, bytearray(), CLIP, ONE_VIEW)


@pytest.mark.parametrize(
    "field, values",
    {
        "frame_indices": [None, ["0"] * 8, [0] * 7, [-1] * 8, [60] * 8, [0.5] * 8, [10**400] * 8, [0] * 8],
        "times_s": [None, "0" * 8, ["0"] * 8, [0] * 7, [0] * 9, [[0]] * 8, [1e999] * 8, [10**400] * 8, [True] * 8],
        "warnings": [None, "text", [1], [["text"]], ["text"] * 1000],
        "decoded_frames": [-1, 1.5, "1", None, True, 10**400],
        "decode_s": [-1, 1e999, 1e300, "1", None],
        "resize_s": [-1, 1e999, 1e300, "1", None],
        "info": [None, [], {}],
        "info.frame_count": [0, -1, 1.5, "1", 10**400],
        "info.duration_s": [-1, 1e999, 3601, "1"],
        "info.fps": [-1, 1e999, 1e9, "1"],
        "info.width": [0, -1, 10**9, 1.5, "64"],
        "info.height": [0, -1, 10**9, 1.5, "64"],
        "info.rotation": [45, -90, "0", 0.0],
        "info.codec": ["", "h264\n", "x" * 1000, 1, None],
        "info.container": ["", "mp4\0", "x" * 1000, 1, None],
        "info.stream": [-1, 1e9, "0", 10**400],
        "info.unknown": [1],
        "unknown": [1],
    }.items(),
    ids=str,
)
def test_invalid_clips_rejected(connections, video, field, values):
    sender, receiver = connections
    clip = load_clip(video, dataclasses.replace(CLIP, limits=settings().clip.limits))
    wire.send_message(sender, *replies.to_message(clip))
    header, payload = wire.receive_message(receiver, max_payload_bytes=2**20)
    limited = dataclasses.replace(CLIP, limits=Limits(max_duration_s=3600, max_frame_pixels=2**24))
    assert replies.read_result(header, payload, limited, ONE_VIEW).pixels.shape == (1, 8, 3, 32, 32)
    for value in values:
        invalid = json.loads(json.dumps(header))
        part = invalid["clip"]["info"] if field.startswith("info.") else invalid["clip"]
        part[field.removeprefix("info.")] = value
        with pytest.raises(wire.MessageError):
            replies.read_result(invalid, payload, limited, ONE_VIEW)
    for wrong_size in (payload[:-1], payload + b"\0", bytearray()):
        with pytest.raises(wire.MessageError):
            replies.read_result(header, wrong_size, limited, ONE_VIEW)


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


def signal_after_receipt(patch, processes, signals):
    """Sends one of the signals to the only process each time it has received a file, and loses its reply."""
    remaining = list(signals)
    lost = []

    def receive(connection, **options):
        if lost:
            if lost.pop() != signal.SIGSTOP:
                raise EOFError
            silent, _other_end = socket.socketpair()
            return wire.receive_message(silent, **options)
        message = wire.receive_message(connection, **options)
        if "received" in message[0] and remaining:
            lost.append(remaining.pop(0))
            processes()[0].send_signal(lost[0])
        return message

    patch.setattr(pool_module, "receive_message", receive)


def raising(error):
    def function(*args, **options):
        raise error

    return function
