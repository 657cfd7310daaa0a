"""A decoder process that an attacker controls: it executes each file that it receives as Python code.

    python hostile_decoder.py DISABLED -m handler.sandbox.process SETTINGS WORKER_PID

DISABLED is a comma-separated list of parts of the confinement to leave out, or "Linux" for another system. The reply
is a VideoError whose message is "done", or the name of the errno that the code failed with.
"""

# The attacks use some of these modules. A confined process cannot load any, but real attackers bring their own code.
import ctypes  # noqa: F401
import errno
import fcntl  # noqa: F401
import mmap  # noqa: F401
import resource  # noqa: F401
import socket  # noqa: F401
import subprocess  # noqa: F401
import sys
import threading  # noqa: F401

from handler.sandbox import confinement, process
from handler.video import VideoError

PARTS = {
    "death signal": "_set_parent_death_signal",
    "capabilities": "_drop_capabilities",
    "Landlock": "_restrict_with_landlock",
    "seccomp": "_install_seccomp_filter",
}


def _not_offered(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")


def _run(_loader, source, **_options):
    try:
        exec(source, {})
    except OSError as error:
        raise VideoError(errno.errorcode.get(error.errno, str(error))) from error
    raise VideoError("done")


if __name__ == "__main__":
    _, disabled, *_, settings, worker_pid = sys.argv
    if disabled == "Linux":
        sys.platform = "darwin"
    else:
        for part in filter(None, disabled.split(", ")):
            setattr(confinement, PARTS[part], _not_offered)
    process.ClipLoader.load = _run
    sys.argv = ["process.py", settings, worker_pid]
    process.main()
