"""Decode 32 frames of a long video: time, memory, and how much of the file is read.

The same packets are stored in two files. Of the MP4 file only the header and the needed packets are read; of the
Matroska file, which does not list every packet, all of them. Each measurement is made in a new process. `peak MB` is
its largest resident memory above that of the interpreter with the imported libraries; frames are converted to RGB one
by one.
"""

import argparse
import contextlib
import io
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import av

from benchmarks.report import Report
from benchmarks.timing import Spread
from benchmarks.videos import FPS, draw_frames
from handler.video import open_video, sample_uniform
from synthetic import write_clip

HELP = "decode 32 frames of a long video: time, memory, bytes read"
QUICK = {"height": 96, "seconds": 120, "threads": [1], "repetitions": 1}
TABLE, NUM_FRAMES = "large", 32
SEGMENT_FRAMES, GOP_FRAMES, BIT_RATE = 500, 250, "1200k"
COLUMNS = (
    ("file", "{file}"),
    ("MB", "{file_mb:.0f}"),
    ("cores", "{threads}"),
    ("wall s", "{wall_s:.1f}"),
    ("min-max", "{wall_low_s:.1f}-{wall_high_s:.1f}"),
    ("CPU s", "{cpu_s:.1f}"),
    ("open s", "{open_s:.2f}"),
    ("peak MB", "{peak_mb:.0f}"),
    ("read", "{read_percent:.1f} %"),
)


class CountingFile(io.FileIO):
    """Counts the bytes that are read."""

    bytes_read = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.bytes_read += len(data)
        return data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--height", type=int, default=720, metavar="PIXELS", help="of the video (default: 720)")
    parser.add_argument("--seconds", type=float, default=3600, metavar="S", help="of the video (default: 3600)")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="decoder threads (default: 1 2)"
    )
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="processes per row (default: 3)")


def run(arguments: argparse.Namespace, report: Report) -> None:
    rows = []
    with tempfile.TemporaryDirectory(prefix="vivit-videos-") as folder:
        report.progress(f"generating {arguments.seconds:g} s of {arguments.height}p")
        segment = write_segment(Path(folder) / "segment.mp4", height=arguments.height)
        files = [
            repeat(segment, Path(folder) / f"long.{suffix}", seconds=arguments.seconds) for suffix in ("mp4", "mkv")
        ]
        for threads in arguments.threads:
            found: dict[Path, list[dict[str, Any]]] = {file: [] for file in files}
            for _ in range(arguments.repetitions):
                for file in files:  # alternately
                    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                        found[file].append(process.submit(measure, file, threads=threads).result())
            for file, measured in found.items():
                rows.append(
                    {
                        "file": file.name,
                        "file_mb": file.stat().st_size / 1e6,
                        "threads": threads,
                        **Spread.of(each["wall_s"] for each in measured).to_row("wall", "s"),
                        **{
                            name: Spread.of(each[name] for each in measured).median
                            for name in ("cpu_s", "open_s", "peak_mb", "read_percent")
                        },
                    }
                )
    report.table(TABLE, COLUMNS, rows)


def write_segment(path: Path, *, height: int) -> Path:
    frames = draw_frames(SEGMENT_FRAMES, height=height, width=round(height * 16 / 9 / 2) * 2)
    rate = {"b": BIT_RATE, "maxrate": BIT_RATE, "bufsize": BIT_RATE}
    options = {"preset": "veryfast", "g": str(GOP_FRAMES), **rate}
    return write_clip(path, frames, fps=FPS, codec="libx264", options=options)


def repeat(segment: Path, path: Path, *, seconds: float) -> Path:
    """Stores the packets of a segment again and again in a file of about `seconds`."""
    with contextlib.ExitStack() as stack:
        old, new = stack.enter_context(av.open(str(segment))), stack.enter_context(av.open(str(path), "w"))
        source = old.streams.video[0]
        stream = new.add_stream_from_template(source)
        packets = [packet for packet in old.demux(source) if packet.size]
        duration = sum(packet.duration for packet in packets)
        for part in range(round(seconds * FPS / SEGMENT_FRAMES) or 1):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts = packet.pts + part * duration, packet.dts + part * duration
                copy.duration, copy.time_base, copy.is_keyframe = packet.duration, source.time_base, packet.is_keyframe
                copy.stream = stream
                new.mux(copy)
    return path


def measure(file: Path, *, threads: int) -> dict[str, float]:
    """Decodes the frames in this process, which must be new."""
    base_mb = memory_mb("VmRSS")
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    with CountingFile(file) as source, open_video(source, thread_count=threads) as video:
        open_s = time.perf_counter() - start_s
        for _, convert in video.frames(sample_uniform(video.info.frame_count, NUM_FRAMES)):
            convert()
        return {
            "wall_s": time.perf_counter() - start_s,
            "cpu_s": time.process_time() - start_cpu_s,
            "open_s": open_s,
            "peak_mb": memory_mb("VmHWM") - base_mb,
            "read_percent": 100 * source.bytes_read / file.stat().st_size,
        }


def memory_mb(name: str) -> float:
    """A value of /proc/self/status in 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e6


def plot(report: Report):
    from benchmarks.plots import bar_chart

    groups: dict[str, dict[str, Spread]] = {}
    for row in report.tables[TABLE]:
        groups.setdefault(f"{row['threads']} threads", {})[row["file"]] = Spread.from_row(row, "wall", "s")
    return bar_chart(groups, title=f"Decoding {NUM_FRAMES} frames of a long video (lower is better)", unit="s")
