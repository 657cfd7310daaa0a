"""Escapes from a decoder process that executes an attacker's code. Each works if the confinement is switched off."""

import contextlib
import dataclasses
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from handler.clips import Clip, ClipSettings, load_clip
from handler.options import HandlerOptions
from handler.processing.resize import ResizeCrop
from handler.sandbox import DecoderCrashError, DecoderPool, DecoderSettings, confinement
from handler.video import VideoError
from tests.support.clips import mutated, write_clip
from tests.support.hostile_clips import CLIPS, FRAMES, Sources, audio, cover_art, subtitle_track

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
    "read_key": "open('{folder}/a').read()",
    "list": "import os; os.listdir('/')",
    "stat": "import os; os.stat('/etc/passwd')",
    "worker_memory": "import os; open(f'/proc/{{os.getppid()}}/mem', 'rb')",
    "create": "open('{folder}/new', 'w')",
    "rename": "import os; os.rename('{folder}/a', '{folder}/c'); os.rename('{folder}/c', '{folder}/a')",
    "truncate": "import os; os.truncate('{folder}/b', 0)",
    "delete": "import os; os.link('{folder}/b', '{folder}/d'); os.unlink('{folder}/d')",
    "chmod": "import os; os.chmod('{folder}/b', 0o700)",
    "connect": "import socket; socket.socket().connect(('127.0.0.1', {port}))",
    "connect_abstract": "import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}')",
    "listen": "import socket; socket.create_server(('', 0))",
    "udp": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 9))",
    "fork": "import os\nfor _ in range(50):\n    if not os.fork(): os._exit(0)\nwhile os.wait() and _: _ -= 1",
    "exec": "import os, subprocess; subprocess.run(['/bin/true'], check=True)",
    "signal": "import os; os.kill(os.getppid(), 0)",
    "signal_by_thread": SYSCALL + "check(libc.tgkill(os.getppid(), os.getppid(), 0))",
    "signal_by_fcntl": "import fcntl, os; fcntl.fcntl(2, 8, os.getppid())",
    # PTRACE_SEIZE, then PTRACE_INTERRUPT and PTRACE_DETACH so that the test goes on.
    "ptrace": SYSCALL
    + "check(libc.ptrace(0x4206, pid := os.getppid(), 0, 0)); check(libc.ptrace(0x4207, pid, 0, 0))\n"
    + "os.waitpid(pid, 0x40000000); check(libc.ptrace(17, pid, 0, 0))",
    "worker_limits": "import os, resource as r; r.prlimit(os.getppid(), r.RLIMIT_CORE, r.getrlimit(r.RLIMIT_CORE))",
    "shared_memory": SYSCALL + "check(id := libc.shmget(0, 900 << 20, 0o1600)); check(libc.shmctl(id, 0, None))",
    "memfd": "import os; os.memfd_create('x')",
    "message_queue": SYSCALL + "check(id := libc.msgget(0, 0o1600)); check(libc.msgctl(id, 0, None))",
    "keyctl": SYSCALL + "check(libc.syscall({keyctl}, 0, -4, 0))",
    "pidfd": "import os; os.pidfd_open(os.getppid())",
    "io_uring": SYSCALL + "check(libc.syscall(425, 1, ctypes.create_string_buffer(120)))",
    "new_namespace": SYSCALL + "check(libc.unshare(0x04000000))",
    "keep_alive": SYSCALL + "check(libc.prctl(1, 0, 0, 0, 0))",
    "priority": "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 1)",
}
STOPPED_BY_LANDLOCK = ("read", "list", "worker_memory", "create", "rename", "truncate", "delete", "connect", "signal")
# A host's configuration may forbid these to every process.
RESTRICTED_BY_HOSTS = ("ptrace", "io_uring", "new_namespace", "pidfd", "keyctl")
DENIED = ("EPERM", "EACCES", "ENOSYS")
ALL = "capabilities, Landlock, seccomp"


@contextlib.contextmanager
def hostile_executable(folder, disabled=""):
    """Replaces sys.executable, so that a pool starts hostile decoders without the `disabled` parts of confinement."""
    script = folder / f"python {disabled}"
    command = [PYTHON, str(ROOT / "tests" / "support" / "hostile_decoder.py"), disabled]
    script.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.join(command)} "$@"\n')
    script.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(script))
        yield


def new_pool(clip=CLIP, **options):
    return DecoderPool(DecoderSettings.from_options(HandlerOptions(max_decode_s=5, **options), clip=clip), processes=1)


@contextlib.contextmanager
def hostile_pool(folder, disabled="", **options):
    with hostile_executable(folder, disabled), contextlib.closing(new_pool(**options)) as pool:
        yield pool


def outcome(pool, code):
    (error,) = pool.load_clips([code.encode()])
    assert isinstance(error, VideoError), error
    return str(error)


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """pools(disabled) returns a hostile pool without these parts of the confinement."""
    folder, made = tmp_path_factory.mktemp("pools"), {}
    with contextlib.ExitStack() as stack:

        def pool(disabled):
            if disabled not in made:
                with hostile_executable(folder, disabled):
                    made[disabled] = stack.enter_context(contextlib.closing(new_pool()))
            return made[disabled]

        if missing := pool("").confinement().missing:
            pytest.skip(f"this host lacks {missing}")
        yield pool


@pytest.fixture(scope="module")
def attack(pools, tmp_path_factory):
    """A function that runs an escape, without some parts of the confinement, and returns its outcome."""
    folder = tmp_path_factory.mktemp("attacked")
    for name in ("a", "b"):
        (folder / name).write_text("content")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0vivit{os.getpid()}")
        abstract.listen()
        names = {"folder": folder, "port": server.getsockname()[1], "name": f"vivit{os.getpid()}"}
        names["keyctl"] = {"x86_64": 250, "aarch64": 219}[platform.machine()]
        yield lambda escape, disabled="": outcome(pools(disabled), ESCAPES[escape].format(**names))


@pytest.mark.parametrize("escape", ESCAPES)
def test_escape_denied(attack, escape):
    assert attack(escape) in DENIED
    unconfined = attack(escape, ALL)
    assert unconfined == "done" or (escape in RESTRICTED_BY_HOSTS and unconfined in DENIED)


@pytest.mark.parametrize("escape", STOPPED_BY_LANDLOCK)
def test_escape_denied_by_each_layer_alone(attack, escape):
    assert attack(escape, "capabilities, seccomp") in DENIED
    assert attack(escape, "capabilities, Landlock") in DENIED


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have no 32-bit calls like these")
def test_32_bit_system_calls_kill_process(tmp_path):
    # mov eax, 20; int 0x80; ret: the number of getpid, which is the number of writev for 64 bits
    code = (
        "import ctypes, mmap\n"
        "memory = mmap.mmap(-1, 4096, prot=7)\n"
        "memory.write(bytes.fromhex('b814000000 cd80 c3'))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()"
    )
    with hostile_pool(tmp_path) as pool:
        (error,) = pool.load_clips([code.encode()])
    assert isinstance(error, DecoderCrashError)


def test_threads_and_own_limits_allowed(pools):
    code = "import resource, threading; t = threading.Thread(target=int); t.start(); t.join(); resource.getrlimit(9)"
    assert outcome(pools(""), code) == "done"


def evaluate(instructions, *, arch, number, arguments=()):
    """What a seccomp filter returns for a system call."""
    data = {0: number, 4: arch, **{16 + 8 * index: value for index, value in enumerate(arguments)}}
    accumulator, position = 0, 0
    while True:
        code, if_true, if_false, operand = instructions[position]
        position += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            accumulator = data[operand]
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x35:
            position += if_true if accumulator >= operand else if_false
        else:
            position += if_true if accumulator == operand else if_false


@pytest.mark.parametrize(
    "machine, arch, read, openat, clone, tgkill",
    [("x86_64", 0xC000003E, 0, 257, 56, 234), ("aarch64", 0xC00000B7, 63, 56, 220, 131)],
)
def test_filter_of_each_architecture(machine, arch, read, openat, clone, tgkill):
    instructions = confinement._seccomp_instructions(machine, pid=42)
    kill, denied, missing, allow = 0x80000000, 0x00050001, 0x00050026, 0x7FFF0000
    thread, vfork = 0x3D0F00, 0x4111
    for number, arguments, expected in [
        (read, (), allow),
        (openat, (), denied),
        (read | 0x40000000, (), missing),  # x32
        *((number, (), missing) for number in range(424, 600)),
        (clone, (thread,), allow),
        (clone, (vfork,), denied),
        (clone, (thread | 0x20000000,), denied),  # in a new PID namespace
        (tgkill, (42,), allow),
        (tgkill, (41,), denied),
    ]:
        assert evaluate(instructions, arch=arch, number=number, arguments=arguments) == expected, number
    assert evaluate(instructions, arch=0x40000003, number=read) == kill


# Decoding


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of all containers and codecs, valid, corrupt and without video."""
    folder = tmp_path_factory.mktemp("clips")
    sources = Sources(folder, url="http://127.0.0.1:9", local_video=folder / "none")
    valid = {name: sources.bytes(name) for name in CLIPS}
    return {
        **valid,
        **{f"corrupt {name}": mutated(content, 1) for name, content in valid.items()},
        "truncated": valid["h264.ts"][:5000],
        "rotated": write_clip(folder / "rotated.mp4", FRAMES, rotation=90).read_bytes(),
        "subtitles": subtitle_track(sources),
        "cover art": cover_art(sources),
        "audio": audio("tone.mp3", "libmp3lame")(sources),
        "text": b"hello, world" * 50,
    }


@pytest.mark.parametrize(
    "resize_crop",
    [
        ResizeCrop(resize_to=32, resample=2, crop_to=(32, 32)),
        ResizeCrop(resize_to=20, resample=2, crop_to=(16, 16), is_fast=True),
    ],
    ids=["exact", "fast"],
)
def test_results_equal_those_without_confinement(files, pools, resize_crop):
    clip_settings = dataclasses.replace(CLIP, resize_crop=resize_crop)
    with contextlib.closing(new_pool(clip_settings)) as pool:
        assert pool.confinement() == pools("").confinement()  # torch has started no threads before
        results = pool.load_clips([*files.values()])
    for (name, content), result in zip(files.items(), results, strict=True):
        try:
            expected = load_clip(content, clip_settings)
        except VideoError as error:
            assert (type(result), str(result)) == (type(error), str(error)), name
        else:
            assert isinstance(result, Clip), (name, result)
            assert (result.info, result.warnings) == (expected.info, expected.warnings), name
            if name in CLIPS:  # what FFmpeg puts in place of missing parts depends on earlier videos
                np.testing.assert_array_equal(result.pixels, expected.pixels, name)


# The process


def test_process_inherits_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("VIVIT_SECRET", "a secret")
    others = {child.pid for child in psutil.Process().children()}
    with socket.create_server(("127.0.0.1", 0)) as server, hostile_pool(tmp_path) as pool:
        server.set_inheritable(True)
        assert outcome(pool, "") == "done"
        (pid,) = {child.pid for child in psutil.Process().children()} - others
        process = Path(f"/proc/{pid}")
        files = sorted(os.readlink(link).split(":")[0] for link in (process / "fd").iterdir())
        assert files == [f"/proc/{pid}/status", "pipe", "pipe", "socket"]
        assert outcome(pool, "import os; os.write(2, b'[METRICS]')") == "EPIPE"
        assert b"VIVIT_SECRET" not in (process / "environ").read_bytes()
        permissions = [line.split()[1] for line in (process / "maps").read_text().splitlines()]
        assert not any("w" in permission and "s" in permission for permission in permissions)
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
        assert (status["CapPrm"], status["CapEff"], status["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
        assert (process / "oom_score_adj").read_text() == "1000\n"


WORKER = """
from handler.clips import *
from handler.sandbox import *
clip = ClipSettings(num_frames=8, resize_crop=ResizeCrop(resize_to=40, resample=2, crop_to=None))
settings = DecoderSettings(clip=clip, max_decode_s=60, max_batch_decode_s=60, max_memory_bytes=2**31)
pool = DecoderPool(settings, processes=2)
pool.load_clips([b"", b""])
print(flush=True)
pool.load_clips([b"import time; time.sleep(60)"])
"""


@pytest.mark.parametrize("disabled, survivors", [("", 0), ("death signal", 1)])
def test_decoders_do_not_outlive_worker(tmp_path, disabled, survivors):
    """Without the signal, a decoder exits only when it reads its connection, which a busy one never does."""
    with hostile_executable(tmp_path, disabled):
        executable = sys.executable
    code = f"import sys; sys.executable = {executable!r}\n{WORKER}"
    worker = subprocess.Popen([PYTHON, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    worker.stdout.readline()
    decoders = alive = psutil.Process(worker.pid).children()
    time.sleep(0.1)  # one of them receives the file
    worker.kill()
    worker.communicate()
    deadline_s = time.monotonic() + 10
    while len(alive) > survivors and time.monotonic() < deadline_s:
        _, alive = psutil.wait_procs(alive, timeout=0.2)
    for process in alive:
        process.kill()
    assert (len(decoders), len(alive)) == (2, survivors)


def test_pool_outlives_thread_that_created_it(tmp_path):
    context = hostile_pool(tmp_path)
    with ThreadPoolExecutor(1) as executor:
        pool = executor.submit(context.__enter__).result()
        pool.confinement()
    assert outcome(pool, "") == "done"
    pool.close()


@pytest.mark.parametrize("disabled, missing", [("", ""), ("seccomp", "seccomp (Function not implemented)")])
def test_required_confinement(pools, tmp_path, disabled, missing):
    assert ", ".join(pools(disabled).confinement().missing) == missing
    with hostile_pool(tmp_path, disabled, sandbox="required") as pool:
        with pytest.raises(RuntimeError) if missing else contextlib.nullcontext() as caught:
            pool.confinement()
        assert not missing or f"sandbox: required, but this host lacks {missing}" in str(caught.value)
        (error,) = pool.load_clips([b""])
        assert isinstance(error, VideoError) != bool(missing)  # no file is sent to a process that lacks a part


def test_other_systems_lack_every_part(tmp_path):
    with hostile_pool(tmp_path, "Linux") as pool:
        assert not pool.confinement().active
        assert len(pool.confinement().missing) == 6 and "not offered by darwin" in pool.confinement().missing[0]
        assert outcome(pool, "") == "done"
