"""The libraries that we compare with, none of which anything else in this project needs."""
import contextlib
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
LENT = "VIVIT_BENCHMARK_FFMPEG"  # set in the process that has been lent PyAV's FFmpeg


def load(module: str, report: Report) -> ModuleType | None:
    """The module, or None and a note that says why its rows are missing."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # ImportError, and whatever a shared library that cannot be loaded ends in
        package = PACKAGES.get(module, module)
        report.note(f"not measured: {package} ({first_line(error)}); `pip install -e .[benchmark]` brings the peers")
        return None


def torchcodec_needs_ffmpeg() -> bool:
    """Whether torchcodec is there, and PyAV has an FFmpeg of its own to lend, which it was not lent yet."""
    return LENT not in os.environ and importlib.util.find_spec("torchcodec") is not None and bool(_ffmpeg_of_pyav())


def run_again_with_ffmpeg() -> int:
    """Runs this very command in a child where torchcodec finds the FFmpeg that PyAV brings; returns its exit status.

    torchcodec brings none and looks for libavcodec.so.N where the system keeps libraries. With PyAV's it needs none to
    be installed there, and the same decoder is compared with itself.
    """
    with tempfile.TemporaryDirectory(prefix="vivit-ffmpeg-") as folder:
        for library in _ffmpeg_of_pyav():
            name, version = re.match(r"(lib\w+)-\w+\.so\.(\d+)", library.name).groups()
            Path(folder, f"{name}.so.{version}").symlink_to(library)
        paths = [folder, str(library.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths), LENT: "1"}
        with contextlib.suppress(KeyboardInterrupt):  # the child got it, too, and says so by its status
            return subprocess.run([sys.executable, *sys.argv], env=environment).returncode
        return 130


def _ffmpeg_of_pyav() -> list[Path]:
    """The shared libraries of FFmpeg in PyAV's wheel; none where it was built against the system's."""
    folder = Path(importlib.util.find_spec("av").origin).parent.parent / "av.libs"
    return sorted([*folder.glob("libav*.so.*"), *folder.glob("libsw*.so.*")])
