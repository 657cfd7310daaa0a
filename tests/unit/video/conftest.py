"""The test files and their frames, each made once."""

import contextlib

import av
import pytest

from tests.support.clips import write_clip
from tests.support.video_files import FRAMES, INDEXED, MISLEADING, SEQUENTIAL


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """clip(name) returns the path of a file of tests/support/video_files.py."""
    folder = tmp_path_factory.mktemp("clips")
    made = {}

    def make(name):
        if name not in made:
            if name in MISLEADING:
                MISLEADING[name](make, folder / name)
            else:
                encoding = {"frames": FRAMES, **{**INDEXED, **SEQUENTIAL}[name]}
                write_clip(folder / name, encoding.pop("frames"), **encoding)
            made[name] = folder / name
        return made[name]

    return make


@pytest.fixture(scope="session")
def every_frame():
    """every_frame(path) returns all frames by sequential decoding with PyAV: the oracle.

    On one thread: with several, FFmpeg does not conceal errors.
    """
    decoded = {}

    def decode(path):
        if path not in decoded:
            frames = decoded[path] = []
            with av.open(str(path)) as container:
                container.streams.video[0].thread_count = 1
                for packet in container.demux(video=0):
                    with contextlib.suppress(av.FFmpegError):
                        for frame in packet.decode():
                            height, width = frames[0].shape[:2] if frames else (frame.height, frame.width)
                            frames.append(frame.reformat(width, height, "rgb24").to_ndarray())
        return decoded[path]

    return decode
