"""The libraries that we compare with, none of which anything else in this project needs."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from benchmarks.measuring import first_line
from benchmarks.report import Report

PACKAGES = {"cv2": "opencv-python-headless"}  # where the package has another name than the module
LENT = "VIVIT_BENCHMARK_FFMPEG_LENT"  # set in the process that has been lent PyAV's FFmpeg


def load(module: str, report: Report) -> ModuleType | None:
    """The module, or None and a note that says why its rows are missing."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # ImportError, and whatever a shared library that cannot be loaded ends in
        name = module.split(".")[0]
        report.note(
            f"not measured: {PACKAGES.get(name, name)} ({first_line(error)}); "
            "pip install -e .[benchmark] brings the peers"
        )
        return None


def can_lend_ffmpeg_to_torchcodec() -> bool:
    """Whether torchcodec is there, and PyAV has an FFmpeg of its own, which has not been lent to it yet."""
    return LENT not in os.environ and bool(importlib.util.find_spec("torchcodec") and _ffmpeg_of_pyav())


def run_again_with_ffmpeg() -> int:
    """Runs this very command in a child where torchcodec finds PyAV's FFmpeg; returns its exit status.

    torchcodec brings none, and looks for libavcodec.so.N where the system keeps libraries. With PyAV's none
    needs to be installed there, and all that is compared has the same decoder.
    """
    libraries = _ffmpeg_of_pyav()
    with tempfile.TemporaryDirectory(prefix="vivit-ffmpeg-") as folder:
        for library in libraries:  # libavcodec-5e6b81c2.so.62.28.102
            name, major_version = re.match(r"(lib\w+)-\w+\.so\.(\d+)", library.name).groups()
            Path(folder, f"{name}.so.{major_version}").symlink_to(library)
        paths = [folder, str(libraries[0].parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths), LENT: "1"}
        try:
            return subprocess.run([sys.executable, *sys.argv], env=environment).returncode
        except KeyboardInterrupt:
            return 130


def _ffmpeg_of_pyav() -> list[Path]:
    """The shared libraries of FFmpeg in PyAV's wheel; none where PyAV was built against the system's."""
    folder = Path(importlib.util.find_spec("av").origin).parent.parent / "av.libs"
    return sorted([*folder.glob("libav*-*.so.*"), *folder.glob("libsw*-*.so.*")])
