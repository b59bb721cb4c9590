"""Connects to boards and laptops through asyncssh. Host keys must be in known_hosts; unknown keys are rejected."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import asyncssh

from exporter.device.connect.connection import (
    MAX_ANSWER_BYTES,
    Address,
    Advance,
    ShellResult,
    dropped,
    pieces,
    too_long,
    too_much,
)
from exporter.device.connect.shell import Line, line
from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError, RequestError

CONNECT_S, LOGIN_S = 15, 30
# A device that answers none of three probes counts as disconnected.
KEEPALIVE_S, KEEPALIVES = 10, 3
SEND_STALL_S = 60
GLOBAL_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")

Result = TypeVar("Result")
Process = asyncssh.SSHClientProcess[bytes]


class _Client(asyncssh.SSHClient):
    """Records a host key that is not in known_hosts, for the error message."""

    offered: asyncssh.SSHKey | None = None

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Trust no key."""
        self.offered = key
        return False


class Ssh:
    """A logged-in SSH connection to a device.

    The event loop runs in its own thread, so that a signal interrupts the caller and not the protocol.

    Args:
        address: The device's address.
        identity: A private key; None uses the agent's and the default keys.

    Raises:
        RequestError: the device cannot be reached, its host key is unknown or wrong, or it rejects the user's key.
    """

    parent = Line('"${XDG_CACHE_HOME:-$HOME/.cache}"')

    def __init__(self, address: Address, identity: Path | None) -> None:
        self.where = address.text
        self._address, self._identity = address, identity
        self._known = known_hosts()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ssh", daemon=True)
        self._thread.start()
        try:
            self._connection = self._wait(self._connect())
        except BaseException:
            self._end_loop()
            raise

    def run(self, command: Line, timeout_s: float) -> ShellResult:
        """Run a shell line on the device; see `Connection.run`."""
        return self._wait(self._run(command, timeout_s))

    def start(self, command: Line, timeout_s: float) -> "_Running":
        """Start a shell line on the device; see `Connection.start`."""
        return self._wait(self._start(command, timeout_s))

    def end(self, process: Process, timeout_s: float) -> ShellResult:
        """End a process's input and wait for it; see `Running.end`."""
        return self._wait(self._end(process, timeout_s))

    def send(self, source: BinaryIO, target: str, advance: Advance) -> None:
        """Write a file on the device; see `Connection.send`."""
        self._wait(self._send(source, target, advance))

    def close(self) -> None:
        """End the connection."""
        self._connection.abort()
        self._end_loop()

    def _end_loop(self) -> None:
        async def settle() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(settle(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except (asyncssh.ConnectionLost, asyncssh.ChannelOpenError, ConnectionError, TimeoutError) as error:
            raise dropped(self.where, error) from error
        except BaseException:
            future.cancel()
            raise

    async def _connect(self) -> asyncssh.SSHClientConnection:
        client = _Client()
        try:
            try:
                return await self._attempt(client)
            except (asyncssh.KeyExchangeFailed, asyncssh.ConnectionLost, ConnectionResetError):
                # asyncssh requests only known kinds of keys. Request any kind, to see which key the device has now.
                return await self._attempt(client, server_host_key_algs="default")
        except (asyncssh.Error, asyncssh.KeyImportError, OSError, TimeoutError) as error:
            raise self._refusal(error, client.offered) from error

    async def _attempt(self, client: _Client, **options: Any) -> asyncssh.SSHClientConnection:
        address = self._address
        options |= {"client_keys": [str(self._identity)], "agent_path": None} if self._identity else {}
        options |= {"username": address.user} if address.user else {}
        options |= {"port": address.port} if address.port else {}
        return await asyncssh.connect(
            address.host, client_factory=lambda: client, known_hosts=self._known, preferred_auth="publickey",
            connect_timeout=CONNECT_S, login_timeout=LOGIN_S, keepalive_interval=KEEPALIVE_S,
            keepalive_count_max=KEEPALIVES, **options,
        )  # fmt: skip

    def _refusal(self, error: Exception, offered: asyncssh.SSHKey | None) -> RequestError:
        where, host = self.where, self._address.host
        if isinstance(error, asyncssh.HostKeyNotVerifiable | asyncssh.KeyExchangeFailed):
            return self._host_key_refusal(error, offered)
        if isinstance(error, asyncssh.PermissionDenied):
            user = f"{self._address.user}@{host}" if self._address.user else host
            port = f" -p {self._address.port}" if self._address.port else ""
            step = f"give it yours with ssh-copy-id{port} {user}, or name the one it knows with --identity FILE"
            return RequestError("the device refused the key", where=where, next_step=step)
        if isinstance(error, asyncssh.KeyImportError):
            step = "name a private key without a passphrase, or add it to the agent with ssh-add and leave --identity"
            return RequestError("the key cannot be used", where=self._identity or where, got=error, next_step=step)
        cause = getattr(error, "strerror", None) or str(error) or "no answer in time"
        step = f"check that it is on and in this network, and that its ssh server answers: ssh {host}"
        return RequestError("the device cannot be reached", where=where, got=shown(cause), next_step=step)

    def _host_key_refusal(self, error: Exception, offered: asyncssh.SSHKey | None) -> RequestError:
        host, port = self._address.host, self._address.port
        name = f"[{host}]:{port}" if port and port != 22 else host
        given = f"{offered.get_algorithm()} {offered.get_fingerprint()}" if offered else shown(str(error))
        if any(asyncssh.match_known_hosts(self._known, host, "", port if port != 22 else None)):
            return RequestError(
                "the device's host key is not the one that is known", where=self.where, got=given,
                expected="the key in known_hosts",
                next_step="this may be another machine in its place; if the device was set up anew, forget the old key "
                f"with ssh-keygen -R '{name}' and add the new one",
            )  # fmt: skip
        scan = f"ssh-keyscan -p {port} {host}" if port and port != 22 else f"ssh-keyscan {host}"
        return RequestError(
            "the device's host key is not known", where=self.where, got=given,
            next_step=f"compare it with ssh-keygen -lf on the device, then add it: {scan} >> ~/.ssh/known_hosts",
        )  # fmt: skip

    async def _run(self, command: Line, timeout_s: float) -> ShellResult:
        async with self._limited(timeout_s):
            return await self._ended(await self._begun(command))

    async def _start(self, command: Line, timeout_s: float) -> "_Running":
        async with self._limited(timeout_s):
            process, said = await self._begun(command), b""
            while b"\n" not in said and (piece := await process.stdout.read(MAX_ANSWER_BYTES)):
                said += piece
                if len(said) > MAX_ANSWER_BYTES:
                    raise too_much(self.where)
        return _Running(self, process, said.partition(b"\n")[0].decode(errors="replace"))

    async def _end(self, process: Process, timeout_s: float) -> ShellResult:
        async with self._limited(timeout_s):
            return await self._ended(process)

    @asynccontextmanager
    async def _limited(self, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise too_long(self.where, timeout_s) from None

    async def _begun(self, command: Line) -> Process:
        # The account's login shell may not be POSIX.
        return await self._connection.create_process(line("exec /bin/sh -c %s", str(command)), encoding=None)

    async def _ended(self, process: Process) -> ShellResult:
        """End a process's input and return its result; always close the channel."""
        try:
            process.stdin.write_eof()
            output, errors = await asyncio.gather(self._read(process.stdout), self._read(process.stderr))
            await process.wait_closed()
        finally:
            process.close()
        code = process.returncode
        if code is None:
            raise dropped(self.where, "the command left no exit status")
        return ShellResult(
            128 - code if code < 0 else code, *(text.decode(errors="replace") for text in (output, errors))
        )

    async def _read(self, stream: asyncssh.SSHReader[bytes]) -> bytes:
        read = bytearray()
        while piece := await stream.read(MAX_ANSWER_BYTES):
            read += piece
            if len(read) > MAX_ANSWER_BYTES:
                raise too_much(self.where)
        return bytes(read)

    async def _send(self, source: BinaryIO, target: str, advance: Advance) -> None:
        process = await asyncio.wait_for(self._begun(line("umask 077; cat > %s", target)), SEND_STALL_S)
        # If the command ends early, its result says why.
        with suppress(BrokenPipeError, TimeoutError):
            for piece in pieces(source, advance):
                process.stdin.write(piece)
                await asyncio.wait_for(process.stdin.drain(), SEND_STALL_S)
        answer = await asyncio.wait_for(self._ended(process), SEND_STALL_S)
        if answer.code:
            raise RequestError("the device could not write the file", where=target, got=answer.last_words)


class _Running:
    """See `Running`."""

    def __init__(self, device: Ssh, process: Process, said: str) -> None:
        self.said = said
        self._device, self._process = device, process

    def end(self, timeout_s: float) -> ShellResult:
        """Wait for the command; see `Running.end`."""
        return self._device.end(self._process, timeout_s)


def known_hosts() -> asyncssh.SSHKnownHosts:
    """Return the host keys known to the user and to this machine.

    Raises:
        InputError: a file of host keys cannot be read.
    """
    found = asyncssh.import_known_hosts("")
    for file in (Path("~/.ssh/known_hosts").expanduser(), GLOBAL_KNOWN_HOSTS):
        if file.is_file():
            try:
                found.load(file.read_text(encoding="utf-8", errors="replace"))
            except (OSError, ValueError) as error:
                raise InputError("the known host keys cannot be read", where=file, got=shown(str(error))) from error
    return found
