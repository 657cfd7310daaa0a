"""A decoder process that an attacker controls: it executes each file that it receives as Python code.

    python hostile_decoder.py DISABLED -m handler.sandbox.process SETTINGS WORKER_PID

DISABLED is a comma-separated list of parts of the confinement to leave out. The reply is a VideoError whose message is
"done", or the name of the errno that the code failed with.
"""

import errno
import sys

from handler.sandbox import confinement, process
from handler.video import VideoError


def _not_offered():
    raise OSError(errno.ENOSYS, "Function not implemented")


def _run(source, _settings, **_options):
    try:
        exec(source, {})
    except OSError as error:
        raise VideoError(errno.errorcode.get(error.errno, str(error))) from error
    raise VideoError("done")


if __name__ == "__main__":
    _, disabled, *_, settings, worker_pid = sys.argv
    if "landlock" in disabled:
        confinement._restrict_with_landlock = _not_offered
    if "seccomp" in disabled:
        confinement._install_seccomp_filter = _not_offered
    if "death signal" in disabled:
        confinement._set_parent_death_signal = lambda _: ""
    process.load_clip = _run
    sys.argv = ["process.py", settings, worker_pid]
    process.main()
