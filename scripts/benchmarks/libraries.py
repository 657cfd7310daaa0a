"""The optional libraries that the benchmarks compare with."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from benchmarks.report import Report
from benchmarks.timing import first_line

PACKAGES = {"cv2": "opencv-python-headless"}  # module name -> package name, if they differ
SHARED_FFMPEG = "VIVIT_BENCHMARK_SHARED_FFMPEG"  # set in the process that runs with PyAV's FFmpeg


def load(module: str, report: Report) -> ModuleType | None:
    """Imports an optional module; returns None and adds a note to the report if that fails."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # ImportError, or any error of a shared library that cannot be loaded
        name = module.split(".")[0]
        report.note(
            f"not measured: {PACKAGES.get(name, name)} ({first_line(error)}); "
            "pip install -e '.[benchmark]' installs the libraries to compare with"
        )
        return None


def can_share_ffmpeg_with_torchcodec() -> bool:
    """Returns True if torchcodec is installed, PyAV bundles FFmpeg, and this process does not share it yet."""
    return SHARED_FFMPEG not in os.environ and bool(importlib.util.find_spec("torchcodec") and _bundled_ffmpeg())


def rerun_with_shared_ffmpeg() -> int:
    """Runs this command again in a child process in which torchcodec finds PyAV's FFmpeg; returns its exit status.

    torchcodec bundles no FFmpeg and looks for libavcodec.so.N among the system's libraries. With PyAV's copy the
    system needs none, and all libraries compared here use the same decoders.
    """
    libraries = _bundled_ffmpeg()
    with tempfile.TemporaryDirectory(prefix="vivit-ffmpeg-") as folder:
        for library in libraries:  # libavcodec-5e6b81c2.so.62.28.102
            name, major_version = re.match(r"(lib\w+)-\w+\.so\.(\d+)", library.name).groups()
            Path(folder, f"{name}.so.{major_version}").symlink_to(library)
        paths = [folder, str(libraries[0].parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths), SHARED_FFMPEG: "1"}
        try:
            return subprocess.run([sys.executable, *sys.argv], env=environment).returncode
        except KeyboardInterrupt:
            return 130


def _bundled_ffmpeg() -> list[Path]:
    """Returns FFmpeg's shared libraries in PyAV's wheel; empty if PyAV uses the system's."""
    folder = Path(importlib.util.find_spec("av").origin).parent.parent / "av.libs"
    return sorted([*folder.glob("libav*-*.so.*"), *folder.glob("libsw*-*.so.*")])
