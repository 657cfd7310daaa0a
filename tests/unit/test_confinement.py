"""Escapes from a decoder process that executes an attacker's code. Each works if the confinement is switched off."""

import contextlib
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from handler.clips import ClipSettings
from handler.options import HandlerOptions
from handler.processing.resize import ResizeCrop
from handler.sandbox import DecoderPool, DecoderSettings
from handler.video import VideoError

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable  # some tests replace it
CLIP = ClipSettings(num_frames=8, resize_crop=ResizeCrop(resize_to=40, resample=2, crop_to=(32, 32)))
SYSCALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
"""

# What the attacker's code does; {folder} contains files `a` and `b`, {port} and {name} accept connections.
ESCAPES = {
    "read": "open('/etc/passwd').read()",
    "list": "import os; os.listdir('/')",
    "worker_memory": "import os; open(f'/proc/{{os.getppid()}}/mem', 'rb')",
    "create": "open('{folder}/new', 'w')",
    "rename": "import os; os.rename('{folder}/a', '{folder}/c'); os.rename('{folder}/c', '{folder}/a')",
    "truncate": "import os; os.truncate('{folder}/a', 0)",
    "delete": "import os; os.link('{folder}/b', '{folder}/d'); os.unlink('{folder}/d')",
    "chmod": "import os; os.chmod('{folder}/b', 0o700)",
    "connect": "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "connect_abstract": "import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}')",
    "listen": "import socket; socket.create_server(('127.0.0.1', 0))",
    "udp": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 9))",
    "fork": "import os\nif not (pid := os.fork()): os._exit(0)\nos.waitpid(pid, 0)",
    "exec": "import os, subprocess; subprocess.run(['/bin/true'], check=True)",
    "signal": "import os; os.kill(os.getppid(), 0)",
    "signal_by_thread": SYSCALL + "check(libc.tgkill(os.getppid(), os.getppid(), 0))",
    "signal_by_fcntl": "import fcntl, os; fcntl.fcntl(2, 8, os.getppid())",
    # PTRACE_SEIZE, then PTRACE_INTERRUPT and PTRACE_DETACH so that the test goes on.
    "ptrace": SYSCALL
    + "check(libc.ptrace(0x4206, pid := os.getppid(), 0, 0)); check(libc.ptrace(0x4207, pid, 0, 0))\n"
    + "os.waitpid(pid, 0x40000000); check(libc.ptrace(17, pid, 0, 0))",
    "worker_limits": "import os, resource as r; r.prlimit(os.getppid(), r.RLIMIT_CORE, r.getrlimit(r.RLIMIT_CORE))",
    "system_v_memory": SYSCALL + "check(id := libc.shmget(0, 4096, 0o1600)); check(libc.shmctl(id, 0, None))",
    "memfd": "import os; os.memfd_create('x')",
    "keyctl": SYSCALL + "check(libc.syscall({keyctl}, 0, -4, 0))",
    "pidfd": "import os; os.pidfd_open(os.getppid())",
    "io_uring": SYSCALL + "check(libc.syscall(425, 1, ctypes.create_string_buffer(120)))",
    "new_namespace": SYSCALL + "check(libc.unshare(0x04000000))",
    "keep_alive": SYSCALL + "check(libc.prctl(1, 0, 0, 0, 0))",
}
STOPPED_BY_LANDLOCK = ("read", "list", "worker_memory", "create", "rename", "truncate", "delete", "connect", "signal")
DENIED = ("EPERM", "EACCES", "ENOSYS")


@contextlib.contextmanager
def hostile_executable(folder, disabled=""):
    """Replaces sys.executable, so that a pool starts hostile decoders without the `disabled` parts of confinement."""
    script = folder / f"python {disabled}"
    command = [PYTHON, str(ROOT / "tests" / "support" / "hostile_decoder.py"), disabled]
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    script.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(script))
        yield


@contextlib.contextmanager
def hostile_pool(folder, disabled="", **options):
    with hostile_executable(folder, disabled):
        settings = DecoderSettings.from_options(HandlerOptions(max_decode_s=5, **options), clip=CLIP)
        pool = DecoderPool(settings, processes=1)
        try:
            yield pool
        finally:
            pool.close()


@pytest.fixture(scope="module")
def attack(tmp_path_factory):
    """A function that runs an escape, without some parts of the confinement, and returns its outcome."""
    folder = tmp_path_factory.mktemp("confinement")
    for name in ("a", "b"):
        (folder / name).write_text("content")
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0vivit{os.getpid()}")
        abstract.listen()
        names = {"folder": folder, "port": port, "name": f"vivit{os.getpid()}"}
        names["keyctl"] = {"x86_64": 250, "aarch64": 219}[platform.machine()]
        pools = {}

        def run(escape, disabled=""):
            if disabled not in pools:
                pools[disabled] = stack.enter_context(hostile_pool(folder, disabled))
            (error,) = pools[disabled].load_clips([ESCAPES[escape].format(**names).encode()])
            assert isinstance(error, VideoError)
            return str(error)

        complete = DecoderPool.confinement(stack.enter_context(hostile_pool(folder)))
        if complete.missing:
            pytest.skip(f"this host lacks {complete.missing}")
        yield run


@pytest.mark.parametrize("escape", ESCAPES)
def test_escape_denied(attack, escape):
    assert attack(escape) in DENIED
    without = attack(escape, "landlock, seccomp")
    # The kernel's own configuration may forbid these.
    assert without == "done" or (escape in ("ptrace", "io_uring", "new_namespace", "pidfd") and without in DENIED)


@pytest.mark.parametrize("escape", sorted({*STOPPED_BY_LANDLOCK} | {"exec", "listen"}))
def test_escape_denied_by_each_layer_alone(attack, escape):
    if escape != "exec":
        assert attack(escape, "seccomp") in DENIED
    assert attack(escape, "landlock") in DENIED


def test_threads_and_own_limits_allowed(attack, monkeypatch):
    code = "import resource, threading; t = threading.Thread(target=int); t.start(); t.join(); resource.getrlimit(9)"
    monkeypatch.setitem(ESCAPES, "none", code)
    assert attack("none") == "done"


WORKER = """
import sys, time
from handler.sandbox import *
from tests.unit.test_confinement import *
pool = DecoderPool(DecoderSettings.from_options(HandlerOptions(), clip=CLIP), processes=1)
print(pool.confinement(), flush=True)
pool.load_clips([b"import time; time.sleep(60)"])
"""


@pytest.mark.parametrize("disabled, survives", [("", False), ("death signal", True)])
def test_decoder_does_not_outlive_worker(tmp_path, disabled, survives):
    with hostile_executable(tmp_path, disabled):
        executable = sys.executable
    code = f"import sys; sys.executable = {executable!r}\n{WORKER}"
    worker = subprocess.Popen([PYTHON, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    worker.stdout.readline()
    (decoder,) = psutil.Process(worker.pid).children()
    assert Path(f"/proc/{decoder.pid}/oom_score_adj").read_text() == "1000\n"
    time.sleep(0.1)  # the file arrives, and the decoder no longer reads its connection
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    _, alive = psutil.wait_procs([decoder], timeout=0.3 if survives else 5)
    for process in alive:
        process.kill()
    assert bool(alive) == survives


def test_environment_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("VIVIT_KEY_FILE", "a secret")
    with hostile_pool(tmp_path) as pool:
        (error,) = pool.load_clips([b"import os\nif 'VIVIT_KEY_FILE' not in os.environ: raise OSError(1, '')"])
    assert str(error) == "EPERM"


@pytest.mark.parametrize("disabled, missing", [("", ""), ("seccomp", "seccomp: Function not implemented")])
def test_required_confinement(tmp_path, disabled, missing):
    with hostile_pool(tmp_path, disabled) as pool:
        assert "; ".join(pool.confinement().missing) == missing
    with hostile_pool(tmp_path, disabled, sandbox="required") as pool:
        with pytest.raises(RuntimeError, match=missing) if missing else contextlib.nullcontext():
            pool.confinement()
        (error,) = pool.load_clips([b""])
        assert isinstance(error, VideoError) != bool(missing)  # no file is sent to a process that lacks a part


def test_pool_outlives_thread_that_created_it(tmp_path):
    context = hostile_pool(tmp_path)
    with ThreadPoolExecutor(1) as executor:
        pool = executor.submit(context.__enter__).result()
        pool.confinement()
    (error,) = pool.load_clips([b""])
    assert str(error) == "done"
    pool.close()
