"""Cuts this process off the network: a network namespace without interfaces, and a filter that refuses sockets.

Neither needs privileges if the system allows user namespaces and seccomp. Each works without the other.
"""

import ctypes
import errno
import os
import socket
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
LOAD, JUMP_IF_EQUAL, JUMP_IF_NOT_BELOW, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
# The kernel's numbers of the architecture and of socket(). io_uring could bypass the filter to open sockets.
ARCHITECTURES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
IO_URING_SETUP = 425
# First system call number of x86's x32 interface.
X32_CALLS = 0x40000000
# Documentation address of RFC 5737; connecting a datagram socket sends nothing.
NOWHERE = ("192.0.2.1", 9)


@cache
def cut_network() -> list[str]:
    """Cut this process off the network permanently, and return the methods that worked; empty if none did.

    Later calls return the same result. The process must have only one thread. Threads and processes that it starts
    later have no network either.
    """
    if sys.platform != "linux":
        return []
    methods = [name for name, cut in (("network namespace", _leave), ("seccomp", _refuse_sockets)) if cut()]
    return [] if reaches_network() else methods


def reaches_network() -> bool:
    """Return whether this process has a socket with a route out of this machine."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(NOWHERE)
    except OSError:
        return False
    return True


def _leave() -> bool:
    """Enter a new network namespace, through a user namespace if that requires privileges."""
    user, group = os.geteuid(), os.getegid()
    if _call("unshare", CLONE_NEWNET):
        return True
    if not _call("unshare", CLONE_NEWUSER | CLONE_NEWNET):
        return False
    # Map the user to itself; the process also works unmapped, as nobody.
    with suppress(OSError):
        for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", file).write_text(text, encoding="ascii")
    return True


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def _refuse_sockets() -> bool:
    """Make socket() fail with EPERM, including Unix sockets, since a daemon behind one may have network access."""
    if os.uname().machine not in ARCHITECTURES:
        return False
    architecture, socket_call = ARCHITECTURES[os.uname().machine]
    instructions = (
        (LOAD, 0, 0, 4),  # seccomp_data.arch
        (JUMP_IF_EQUAL, 0, 5, architecture),
        (LOAD, 0, 0, 0),  # seccomp_data.nr
        (JUMP_IF_NOT_BELOW, 3, 0, X32_CALLS),
        (JUMP_IF_EQUAL, 2, 0, IO_URING_SETUP),
        (JUMP_IF_EQUAL, 1, 0, socket_call),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    )
    array = (_Instruction * len(instructions))(*(_Instruction(*fields) for fields in instructions))
    program = _Program(len(instructions), array)
    if not _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return _call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)


def _call(name: str, *arguments: object) -> bool:
    """Call a function of libc and return whether it succeeded."""
    return bool(getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) == 0)
