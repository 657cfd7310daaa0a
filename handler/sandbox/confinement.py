"""Confinement of a decoder process: what the kernel still allows it after it has loaded its libraries.

Threat model. FFmpeg parses files of unknown origin in C, so assume that a crafted file executes its own code in the
decoder process. That code must not reach anything: no files, no network, no other process, no kernel interface that
decoding does not need. It may return a wrong clip or error for its own file (the worker checks the form of each reply)
and use its own limits of time and memory.

    no_new_privs         nothing that the process executes could gain privileges; seccomp and Landlock require it
    parent death signal  the kernel kills the process when its worker exits, even if it no longer reads its connection
    oom_score_adj        if memory runs out, the kernel kills decoder processes first, not the worker
    Landlock             no file can be opened or changed; no TCP (ABI 4); no signals or abstract sockets (ABI 6)
    seccomp              system calls are denied: opening and changing files, sockets, new processes, tracing, shared
                         memory, and all system calls that are newer than Linux 5.0

Landlock and seccomp overlap, so that each alone keeps files, the network and other processes out of reach.

Not covered: the process can read the names and metadata of files (stat), write to standard error, which is the worker's
log, keep CPU cores busy until max_decode_s, and attack the kernel through the system calls that remain. Denied calls
fail with EPERM instead of killing the process, because libraries try some of them and continue without.

seccomp filters are a deny-list: which calls glibc, Python, FFmpeg and torch need differs between their versions. ctypes
is sufficient; the packages for Landlock cover only part of this, and those for seccomp need libseccomp on the host.
"""

import ctypes
import dataclasses
import errno
import os
import platform
import signal
import struct
from collections.abc import Callable
from pathlib import Path

# Numbers from linux/prctl.h, linux/seccomp.h, linux/filter.h, linux/audit.h and linux/landlock.h.
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 1, 15, 38
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_RET_KILL_PROCESS, _RET_ERRNO, _RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LD_WORD, _AND, _JEQ, _JGE, _RET = 0x20, 0x54, 0x15, 0x35, 0x06
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16  # in struct seccomp_data
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446  # the same number on every architecture
_LANDLOCK_CREATE_RULESET_VERSION = 1

# The system calls from this number on are the same on every architecture. They were added after Linux 5.0, therefore
# libraries work without them. They include clone3 (glibc uses clone instead), io_uring_*, pidfd_*, openat2, the new
# mount calls, process_madvise and memfd_secret. The numbers of the x32 ABI are higher, too.
_FIRST_NEW_SYSCALL = 424

# machine: (AUDIT_ARCH, column in _DENIED)
_ARCHITECTURES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}

# name, number on x86-64, number on aarch64; "-" where the architecture lacks the call
_DENIED = """
socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242,
sendmsg 46 211, sendmmsg 307 269, recvmsg 47 212, recvmmsg 299 243,
execve 59 221, execveat 322 281, fork 57 -, vfork 58 -, ptrace 101 117, kcmp 312 272,
process_vm_readv 310 270, process_vm_writev 311 271, kill 62 129, tkill 200 130,
rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, setpgid 109 154, setsid 112 157, setpriority 141 140,
sched_setaffinity 203 122, sched_setparam 142 118, sched_setscheduler 144 119, sched_setattr 314 274, ioprio_set 251 30,
migrate_pages 256 238, move_pages 279 239,
open 2 -, openat 257 56, creat 85 -, open_by_handle_at 304 265, name_to_handle_at 303 264,
truncate 76 45, ftruncate 77 46, fallocate 285 47, rename 82 -, renameat 264 38, renameat2 316 276,
link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, unlink 87 -, unlinkat 263 35,
mkdir 83 -, mkdirat 258 34, rmdir 84 -, mknod 133 -, mknodat 259 33,
chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54,
utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88,
setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,
inotify_init 253 -, inotify_init1 294 26, fanotify_init 300 262, flock 73 32,
shmget 29 194, shmat 30 196, shmctl 31 195, shmdt 67 197, memfd_create 319 279,
msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_open 240 180, mq_unlink 241 181,
semget 64 190, semop 65 193, semctl 66 191, semtimedop 220 192,
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268, quotactl 179 60,
swapon 167 224, swapoff 168 225, acct 163 89, uselib 134 -,
add_key 248 217, request_key 249 218, keyctl 250 219, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282,
seccomp 317 277, io_setup 206 0, io_submit 209 2, personality 135 92, modify_ldt 154 -, iopl 172 -, ioperm 173 -,
kexec_load 246 104, kexec_file_load 320 294, init_module 175 105, finit_module 313 273, delete_module 176 106,
reboot 169 142, syslog 103 116, lookup_dcookie 212 18, settimeofday 164 170, clock_settime 227 112, adjtimex 159 171,
clock_adjtime 305 266, sethostname 170 161, setdomainname 171 162,
setuid 105 146, setgid 106 144, setreuid 113 145, setregid 114 143, setresuid 117 147, setresgid 119 149,
setgroups 116 159, capset 126 91
"""

_CLONE_THREAD, _CLONE_NEW_NAMESPACE = 0x00010000, 0x7E020000


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
    active, missing = [], []
    parts: tuple[tuple[str, Callable[[], str]], ...] = (
        ("parent death signal", lambda: _set_parent_death_signal(parent_pid)),
        ("oom_score_adj", _set_oom_score),
        ("no_new_privs", lambda: _prctl(_PR_SET_NO_NEW_PRIVS, 1)),
        ("Landlock", _restrict_with_landlock),
        ("seccomp", _install_seccomp_filter),
    )
    for name, apply in parts:
        try:
            active.append(f"{name}{apply()}")
        except OSError as error:
            missing.append(f"{name}: {error.strerror or error}")
    return Confinement(active=tuple(active), missing=tuple(missing))


def _set_parent_death_signal(parent_pid: int) -> str:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent exited before the call, so that no signal will come
        raise SystemExit("the worker has exited")
    return ""


def _set_oom_score() -> str:
    Path("/proc/self/oom_score_adj").write_text("1000")
    return ""


def _restrict_with_landlock() -> str:
    """Denies everything that this kernel's Landlock can deny. Returns its ABI version."""
    if len(os.listdir("/proc/self/task")) > 1:
        raise OSError("the process has several threads, and Landlock would restrict only one")
    abi = _syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)
    file_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)  # number of rights that this ABI has
    # struct landlock_ruleset_attr: denied rights on files and TCP ports, and scopes. A ruleset without rules.
    attributes = struct.pack("=QQQ", (1 << file_rights) - 1, 0b11, 0b11)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _syscall(_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        _syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return f" (ABI {abi})"


def _install_seccomp_filter() -> str:
    """Denies system calls in all threads."""
    if platform.machine() not in _ARCHITECTURES or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(f"not supported on {platform.machine()}")
    program = _seccomp_program(*_ARCHITECTURES[platform.machine()])
    buffer = ctypes.create_string_buffer(program)
    address = ctypes.addressof(buffer)
    filter_program = struct.pack("@HP", len(program) // 8, address)  # struct sock_fprog
    number = _numbers(_ARCHITECTURES[platform.machine()][1])["seccomp"]
    thread = _syscall(number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, filter_program)
    if thread > 0:
        raise OSError(f"thread {thread} has another filter")
    return ""


def _seccomp_program(audit_arch: int, column: int) -> bytes:
    """Returns the filter as struct sock_filter[]: (code, jump if true, jump if false, operand)."""
    deny = (_RET, 0, 0, _RET_ERRNO | errno.EPERM)
    program = [
        (_LD_WORD, 0, 0, _ARCH_OFFSET),
        (_JEQ, 1, 0, audit_arch),
        (_RET, 0, 0, _RET_KILL_PROCESS),  # a 32-bit system call, whose numbers are different
        (_LD_WORD, 0, 0, _NR_OFFSET),
        (_JGE, 0, 1, _FIRST_NEW_SYSCALL),
        (_RET, 0, 0, _RET_ERRNO | errno.ENOSYS),
    ]
    for number in _numbers(column).values():
        program += [(_JEQ, 0, 1, number), deny]
    for numbers, conditions in _allowed_arguments().items():
        checks = []
        for argument, mask, values in conditions:
            checks += [(_LD_WORD, 0, 0, _ARGS_OFFSET + 8 * argument), (_AND, 0, 0, mask)]  # the low 32 bits
            checks += [(_JEQ, len(values) - index, 0, value) for index, value in enumerate(values)]
            checks += [deny]
        program += [(_JEQ, 0, len(checks) + 1, numbers[column - 1]), *checks, (_RET, 0, 0, _RET_ALLOW)]
    program.append((_RET, 0, 0, _RET_ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _allowed_arguments() -> dict[tuple[int, int], tuple[tuple[int, int, tuple[int, ...]], ...]]:
    """Maps (number on x86-64, number on aarch64) to (argument, mask, allowed values); all conditions must hold."""
    whole = 0xFFFFFFFF
    return {
        (56, 220): ((0, _CLONE_THREAD | _CLONE_NEW_NAMESPACE, (_CLONE_THREAD,)),),  # clone: threads only
        (234, 131): ((0, whole, (os.getpid(),)),),  # tgkill, which abort() uses: this process only
        (302, 261): ((0, whole, (0,)),),  # prlimit64: this process only
        (157, 167): ((0, whole, (_PR_SET_NAME,)),),  # prctl
        # fcntl: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. F_SETOWN and F_SETSIG can send signals.
        (72, 25): ((1, whole, (0, 1, 2, 3, 1030)),),
        # ioctl: FIONBIO of the connection, standard input. TIOCSTI types into a terminal, FIOSETOWN sends signals.
        (16, 29): ((0, whole, (0,)), (1, whole, (0x5421,))),
    }


def _numbers(column: int) -> dict[str, int]:
    rows = [row.split() for row in _DENIED.split(",")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def _prctl(option: int, value: int) -> str:
    _check(
        ctypes.CDLL(None, use_errno=True).prctl(option, *(ctypes.c_ulong(argument) for argument in (value, 0, 0, 0)))
    )
    return ""


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
