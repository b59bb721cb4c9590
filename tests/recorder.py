"""A network that is recorded: what a command and its children look up and reach for, native code included.

    unshare --net --map-root-user python tests/recorder.py RECORD COMMAND...

In a network namespace of its own every address is this machine's, so that nothing leaves it. RECORD becomes a JSON list
of what was sent to other addresses than the loopback's: a name where a resolver was asked, else address and port.
"""

import contextlib
import fcntl
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

SIOCSIFFLAGS, IFF_UP, LOOPBACK_INDEX = 0x8914, 1, 1
RTM_NEWROUTE, NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE = 24, 1, 4, 0x400
RTA_OIF, RT_TABLE_LOCAL, RTPROT_BOOT, RT_SCOPE_HOST, RTN_LOCAL = 4, 255, 3, 254, 2
ALL_FRAMES, IPV4, TCP, UDP, DNS, SYN, ACK = 3, b"\x08\x00", 6, 17, 53, 2, 16
UNSHARE = ["unshare", "--net", "--map-root-user"]


# What is always recorded: that something is.
HEARD = ["recorder.invalid"]


def recorded(
    command: list[str], record: Path, folder: Path, environment: dict[str, str]
) -> "tuple[subprocess.CompletedProcess[str], list[str] | None]":
    """Run a command and return what it reached for; None where this system lets nobody make a network."""
    can = (
        shutil.which("unshare") and not subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode
    )
    line = [*UNSHARE, sys.executable, __file__, str(record), *command] if can else command
    done = subprocess.run(line, check=False, capture_output=True, text=True, cwd=folder, env=environment)
    return done, json.loads(record.read_text()) if can else None


def _all_addresses_are_here() -> None:
    """Switch the loopback on, and route everything to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
    route = struct.pack("8BI", socket.AF_INET, 0, 0, 0, RT_TABLE_LOCAL, RTPROT_BOOT, RT_SCOPE_HOST, RTN_LOCAL, 0)
    route += struct.pack("HHI", 8, RTA_OIF, LOOPBACK_INDEX)
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
        kernel.send(struct.pack("IHHII", 16 + len(route), RTM_NEWROUTE, flags, 1, 0) + route)
        assert kernel.recv(4096)[16:20] == bytes(4)


def _listen(frames: socket.socket, seen: set[str]) -> None:
    while frame := frames.recv(1 << 16):
        packet = frame[14:]
        if frame[12:14] != IPV4 or packet[9] not in (TCP, UDP):
            continue
        head, address = 4 * (packet[0] & 15), socket.inet_ntoa(packet[16:20])
        body = packet[head:]
        source, port = struct.unpack("!HH", body[:4])
        begins = source != DNS if packet[9] == UDP else body[13] & (SYN | ACK) == SYN
        if begins and packet[9] == UDP and port == DNS:
            seen.add(_name(body[8:]))
        elif begins and not address.startswith("127."):
            seen.add(f"{address}:{port}")


def _name(query: bytes) -> str:
    parts, at = [], 12
    while query[at]:
        parts.append(query[at + 1 : at + 1 + query[at]].decode(errors="replace"))
        at += 1 + query[at]
    return ".".join(parts)


def _resolve(server: socket.socket) -> None:
    """Answer that there is no such name."""
    while True:
        query, asker = server.recvfrom(4096)
        server.sendto(query[:2] + b"\x81\x83" + query[4:6] + bytes(6) + query[12:], asker)


def main(record: str, *command: str) -> int:
    """Run a command and write the record."""
    seen: set[str] = set()
    _all_addresses_are_here()
    frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_FRAMES))
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("0.0.0.0", DNS))
    for target, arguments in ((_listen, (frames, seen)), (_resolve, (server,))):
        threading.Thread(target=target, args=arguments, daemon=True).start()
    code = subprocess.run(command, check=False).returncode
    with contextlib.suppress(OSError):
        socket.getaddrinfo(*HEARD, 80)
    time.sleep(0.1)
    Path(record).write_text(json.dumps(sorted(seen)))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
