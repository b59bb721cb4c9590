"""A real sshd on the loopback with keys, configuration and a home of its own, and programs that misbehave there."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

INSTALL = "sudo apt-get install openssh-server"
HOST = "127.0.0.1"
# Kills the sshd that serves this very session: what a pulled cable looks like.
DROP = """#!{python}
import os, signal, sys
if sys.argv[1:]:
    os.execv("/bin/cat", ["cat", *sys.argv[1:]])
sys.stdin.buffer.read(100_000)
process = os.getppid()
while True:
    with open(f"/proc/{{process}}/stat") as stat:
        name, after = stat.read().split("(", 1)[1].rsplit(")", 1)
    if name.startswith("sshd"):
        os.kill(process, signal.SIGKILL)
        sys.exit(1)
    process = int(after.split()[1])
"""


def find_sshd() -> str | None:
    """Return the path of the ssh server, which users' own PATH often leaves out."""
    return shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))


class Sshd:
    """A running server, and a user with a home, a key and known hosts.

    Args:
        folder: For all its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home, self.far, self.programs = folder / "near", folder / "far", folder / "programs"
        for made in (self.home / ".ssh", self.far, self.programs):
            made.mkdir(parents=True, mode=0o700)
        self.host_key, self.identity = key(folder / "host_key"), key(self.home / ".ssh/id_ed25519")
        shutil.copy(f"{self.identity}.pub", folder / "authorized_keys")
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port = free.getsockname()[1]
        self.user = pwd.getpwuid(os.getuid()).pw_name
        (folder / "config").write_text(self._config())
        self.know(self.host_key)

    @property
    def address(self) -> str:
        """What `--on` takes."""
        return f"ssh://{self.user}@{HOST}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What the command line runs under: a home of its own, and no agent of the user's."""
        return {"HOME": str(self.home), "SSH_AUTH_SOCK": ""}

    @property
    def left(self) -> list[str]:
        """Files that the device still has of ours."""
        return sorted(str(path.relative_to(self.far)) for path in self.far.rglob("edge-exporter/**/*"))

    def know(self, public: Path) -> None:
        """Make a host key the known one."""
        kind, data = Path(f"{public}.pub").read_text().split()[:2]
        (self.home / ".ssh/known_hosts").write_text(f"[{HOST}]:{self.port} {kind} {data}\n")

    def know_nothing(self) -> None:
        """Forget the host key."""
        (self.home / ".ssh/known_hosts").unlink()

    def put(self, name: str, text: str) -> None:
        """Put a program in front of the device's own."""
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def drop_mid_push(self) -> None:
        """Let the session die once some of a file has arrived."""
        self.put("cat", DROP.format(python=sys.executable))

    def restore(self) -> None:
        """Let the device be well again."""
        for path in self.programs.iterdir():
            path.unlink()
        self.know(self.host_key)

    def _config(self) -> str:
        # Sessions get another home, so that no shell reads a user's files, and paths with `programs` in front.
        path = f"{self.programs}:{os.environ.get('PATH', '')}:/usr/bin:/bin"
        return "\n".join(
            [
                f"ListenAddress {HOST}", f"Port {self.port}", f"HostKey {self.host_key}", "PidFile none",
                f"AuthorizedKeysFile {self.folder / 'authorized_keys'}", "StrictModes no", "UsePAM no",
                "PasswordAuthentication no", "KbdInteractiveAuthentication no", "PrintMotd no", "PrintLastLog no",
                f'SetEnv "HOME={self.far}" "PATH={path}"', "",
            ]
        )  # fmt: skip

    @contextlib.contextmanager
    def running(self, sshd: str) -> Iterator["Sshd"]:
        """Serve until the block ends."""
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        with (self.folder / "log").open("wb") as log:
            server = subprocess.Popen([sshd, "-D", "-e", "-f", self.folder / "config"], stderr=log)
        try:
            self._await(server)
            yield self
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()

    def _await(self, server: "subprocess.Popen[bytes]") -> None:
        for _ in range(200):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection((HOST, self.port)):
                return
            assert server.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text())


def key(path: Path) -> Path:
    """Make a pair of keys and return the path of the private one."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path
