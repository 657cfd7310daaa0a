"""Confinement of a decoder process: what the kernel still allows it after it has loaded its libraries.

README.md states the threat model. The parts, in the order in which they are applied:

    parent death signal  the kernel kills the process when its worker exits, even if it no longer reads its connection
    oom_score_adj        if memory runs out, the kernel kills decoder processes first, not the worker
    no_new_privs         nothing that the process executes gains privileges; Landlock and seccomp require it
    capabilities         none, even if the worker runs as root
    Landlock             no file can be opened or changed; no TCP (ABI 4); no signals or abstract sockets (ABI 6)
    seccomp              all system calls are denied, except those that decoding needs

Landlock and seccomp overlap: each alone denies opening and changing files, and recent versions of Landlock deny TCP and
signals as well.

The list of seccomp depends little on the versions of glibc, Python, FFmpeg and torch. System calls that are newer than
the list fail as if the kernel lacked them (ENOSYS), so that libraries use older ones, which the list contains. Other
calls fail with EPERM and do not kill the process, because libraries try some of them and work without. All calls of the
list affect the process itself only.

The module uses ctypes. The packages for Landlock (`landlock`, `py-landlock`) are alpha versions and would replace 15 of
these lines; `pyseccomp` needs libseccomp on the host and has had no release since 2021.
"""

import ctypes
import dataclasses
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

# Numbers from linux/prctl.h, linux/capability.h, linux/seccomp.h, linux/filter.h, linux/audit.h and linux/landlock.h.
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 1, 15, 38
_CAPABILITY_VERSION_3 = 0x20080522
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446  # the same numbers on every architecture
_LANDLOCK_CREATE_RULESET_VERSION = 1
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _AND, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER_OFFSET, _ARCH_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16  # in struct seccomp_data

# machine: (AUDIT_ARCH, column in the tables below, number of seccomp)
_ARCHITECTURES = {"x86_64": (0xC000003E, 1, 317), "aarch64": (0xC00000B7, 2, 277)}

# Name, number on x86-64, number on aarch64; "-" where the architecture lacks the call.
_ALLOWED_CALLS = """
read 0 63, write 1 64, close 3 57, fstat 5 80, lseek 8 62, pread64 17 67, readv 19 65, writev 20 66,
sendto 44 206, recvfrom 45 207, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233, brk 12 214,
futex 202 98, set_robust_list 273 99, set_tid_address 218 96, rseq 334 293,
sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, exit 60 93, exit_group 231 94,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132, restart_syscall 219 128,
setitimer 38 103, getitimer 36 102, nanosleep 35 101, clock_nanosleep 230 115,
clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165,
getpid 39 172, gettid 186 178, getppid 110 173, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
uname 63 160, sysinfo 99 179, getrandom 318 278, getrlimit 97 163, setrlimit 160 164
"""

# System calls from this number on are newer than Linux 5.0. The numbers of the x32 ABI are higher, too.
_FIRST_NEW_CALL = 424

_CLONE_THREAD, _CLONE_NEW_NAMESPACES = 0x00010000, 0x7E020000
_FIONBIO = 0x5421


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confinement:
    """Which parts of the confinement a decoder process has.

    Attributes:
        active: Names of the parts that are in effect.
        missing: Name and cause of each part that the kernel does not offer.
    """

    active: tuple[str, ...]
    missing: tuple[str, ...]


def confine(*, parent_pid: int) -> Confinement:
    """Confines this process. Call it after the libraries are loaded, and before threads exist and a file is read.

    Args:
        parent_pid: Process that has started this one.

    Raises:
        SystemExit: The parent has exited.
    """
    parts: dict[str, Callable[[], str | None]] = {
        "parent death signal": lambda: _set_parent_death_signal(parent_pid),
        "oom_score_adj": _set_oom_score,
        "no_new_privs": lambda: _prctl(_PR_SET_NO_NEW_PRIVS, 1),
        "capabilities": _drop_capabilities,
        "Landlock": _restrict_with_landlock,
        "seccomp": _install_seccomp_filter,
    }
    active, missing = [], []
    for name, apply in parts.items():
        try:
            if sys.platform != "linux":
                raise OSError(f"not offered by {sys.platform}")
            detail = apply()
            active.append(f"{name} ({detail})" if detail else name)
        except OSError as error:
            missing.append(f"{name} ({error.strerror or error})")
    return Confinement(active=tuple(active), missing=tuple(missing))


def _set_parent_death_signal(parent_pid: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent exited before the call, so that no signal will come
        raise SystemExit("the worker has exited")


def _set_oom_score() -> None:
    Path("/proc/self/oom_score_adj").write_text("1000")


def _drop_capabilities() -> None:
    """Clears the effective, permitted and inheritable sets. With no_new_privs, execve cannot fill them again."""
    _require_single_thread()
    header, sets = struct.pack("@Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
    _check(ctypes.CDLL(None, use_errno=True).capset(header, sets))


def _restrict_with_landlock() -> str:
    """Denies everything that this kernel's Landlock can deny. Returns its ABI version."""
    _require_single_thread()
    abi = _syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)
    file_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)  # number of rights that this ABI has
    # struct landlock_ruleset_attr: denied rights on files and TCP ports, and scopes. A ruleset without rules.
    attributes = struct.pack("=QQQ", (1 << file_rights) - 1, 0b11, 0b11)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _syscall(_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        _syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return f"ABI {abi}"


def _install_seccomp_filter() -> None:
    machine = platform.machine()
    if machine not in _ARCHITECTURES or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(f"not supported on {machine}")
    instructions = _seccomp_instructions(machine, pid=os.getpid())
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions))
    header = struct.pack("@HP", len(instructions), ctypes.addressof(program))  # struct sock_fprog
    thread = _syscall(_ARCHITECTURES[machine][2], _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, header)
    if thread > 0:
        raise OSError(f"thread {thread} has another filter")


def _seccomp_instructions(machine: str, *, pid: int) -> list[tuple[int, int, int, int]]:
    """Returns the filter: (code, instructions to skip if true, to skip if false, operand) of each instruction."""
    audit_arch, column, _ = _ARCHITECTURES[machine]
    # Numbers of calls that are allowed if the low 32 bits of an argument have a value: (argument, mask, value).
    allowed_arguments = {
        (56, 220): (0, _CLONE_THREAD | _CLONE_NEW_NAMESPACES, _CLONE_THREAD),  # clone: threads only
        (234, 131): (0, 0xFFFFFFFF, pid),  # tgkill, which abort() uses: this process only
        (302, 261): (0, 0xFFFFFFFF, 0),  # prlimit64: this process only
        (157, 167): (0, 0xFFFFFFFF, _PR_SET_NAME),  # prctl: names of threads
        (16, 29): (1, 0xFFFFFFFF, _FIONBIO),  # ioctl: timeouts of the connection
    }
    allow, deny = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    instructions = [
        (_LOAD, 0, 0, _ARCH_OFFSET),
        (_JUMP_IF_EQUAL, 1, 0, audit_arch),
        (_RETURN, 0, 0, _KILL_PROCESS),  # a 32-bit call, whose numbers are different
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        (_JUMP_IF_AT_LEAST, 0, 1, _FIRST_NEW_CALL),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    for row in _ALLOWED_CALLS.split(","):
        if (number := row.split()[column]) != "-":
            instructions += [(_JUMP_IF_EQUAL, 0, 1, int(number)), allow]
    for numbers, (argument, mask, value) in allowed_arguments.items():
        instructions += [
            (_JUMP_IF_EQUAL, 0, 5, numbers[column - 1]),
            (_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * argument),
            (_AND, 0, 0, mask),
            (_JUMP_IF_EQUAL, 0, 1, value),
            allow,
            deny,
        ]
    return [*instructions, deny]


def _require_single_thread() -> None:
    if len(os.listdir("/proc/self/task")) > 1:
        raise OSError("the process has several threads, and only one would be restricted")


def _prctl(option: int, value: int) -> None:
    arguments = (ctypes.c_ulong(argument) for argument in (value, 0, 0, 0))
    _check(ctypes.CDLL(None, use_errno=True).prctl(option, *arguments))


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    converted = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    return _check(syscall(ctypes.c_long(number), *converted))


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
