"""The sandboxed process that runs one generated program; started by `sandbox.py`, imports only the standard library.

Reads a JSON document from standard input (program, token, limits), sandboxes itself, says so on standard output, runs the
program, and writes the token there if that ended without an exception. The sandbox is a seccomp filter, an allow-list of system
calls: others fail with EPERM. Files can be read but not written, created or deleted; there are no sockets, no processes, no
threads, no signals to others. The kernel limits CPU time and memory (rlimits). All of it is inherited and cannot be undone. No
privileges are needed.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

UNABLE = 70
"""Exit code if the kernel or the architecture has no such filter. A program may exit with it, too, but is `LOCKED` in by then."""

LOCKED = b"locked "
"""What is written before the program begins."""

ANSWER_BYTES = 64
"""Maximum length of what can be written to standard output, by the program, too."""

_ALLOWED = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10,
        "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "readv": 19,
        "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33,
        "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "getdents": 78, "getcwd": 79, "readlink": 89,
        "gettimeofday": 96, "getrlimit": 97, "sysinfo": 99, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
        "getppid": 110, "sigaltstack": 131, "arch_prctl": 158, "gettid": 186, "time": 201, "futex": 202,
        "sched_getaffinity": 204, "getdents64": 217, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
        "exit_group": 231, "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271,
        "set_robust_list": 273, "dup3": 292, "pipe2": 293, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334,
        "faccessat2": 439,
    },
    "aarch64": {
        "getcwd": 17, "dup": 23, "dup3": 24, "faccessat": 48, "close": 57, "pipe2": 59, "getdents64": 61,
        "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pselect6": 72, "ppoll": 73,
        "readlinkat": 78, "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98, "set_robust_list": 99,
        "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123,
        "sched_yield": 124, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "uname": 160,
        "getrlimit": 163, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177,
        "gettid": 178, "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233,
        "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293, "faccessat2": 439,
    },
}  # fmt: skip
_OPENS = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}
"""`open` and `openat`: (system call number, index of the flags argument)."""
_COMMANDS = {"x86_64": {16: (0x5401, 0x5451), 72: (0, 1, 2, 3, 1030)}, "aarch64": {29: (0x5401, 0x5451), 25: (0, 1, 2, 3, 1030)}}
"""`ioctl` (TCGETS, FIOCLEX) and `fcntl` (F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC): allowed second arguments."""
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | getattr(os, "O_TMPFILE", 0) & ~os.O_DIRECTORY
_LOAD, _EQUAL, _ABOVE, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _KILL, _DENY = 0x7FFF0000, 0x80000000, 0x00050000 | 1


def _filter(machine: str) -> bytes:
    """The filter as BPF; each instruction is (code, jump if true, jump if not, value)."""
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    code += [(_ABOVE, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]  # x32 system calls
    for number, argument in _OPENS[machine]:
        checks = [(_LOAD, 0, 0, 16 + 8 * argument), (_AND, 0, 0, _WRITES), (_EQUAL, 0, 1, 0), (_RETURN, 0, 0, _ALLOW)]
        code += [(_EQUAL, 0, len(checks) + 1, number), *checks, (_RETURN, 0, 0, _DENY)]
    for number, commands in _COMMANDS[machine].items():
        checks = [(_LOAD, 0, 0, 16 + 8)]
        for command in commands:
            checks += [(_EQUAL, 0, 1, command), (_RETURN, 0, 0, _ALLOW)]
        code += [(_EQUAL, 0, len(checks) + 1, number), *checks, (_RETURN, 0, 0, _DENY)]
    for number in _ALLOWED[machine].values():
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _DENY))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _lock(memory_bytes: int, seconds: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CPU: seconds, resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: ANSWER_BYTES, resource.RLIMIT_NOFILE: 64,
    }  # fmt: skip
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter(platform.machine())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    no_new_privileges, set_seccomp, with_filter, die_with_parent = 38, 22, 2, 1
    libc.prctl(die_with_parent, signal.SIGKILL, 0, 0, 0)
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, with_filter, ctypes.byref(program), 0, 0):
        sys.exit(UNABLE)


def main() -> None:
    """Run the program given on standard input."""
    given = json.load(sys.stdin)
    token, text = given["token"], given["program"]
    if platform.machine() not in _ALLOWED:
        sys.exit(UNABLE)
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.argv = ["program"]
    _lock(given["memory_bytes"], given["seconds"])
    os.write(answer, LOCKED)
    exec(compile(text, "program", "exec"), {"__name__": "__main__"})
    os.write(answer, token.encode())


if __name__ == "__main__":
    main()
