"""Runs ARM64 programs by QEMU's user mode emulation, which translates instructions and forwards system calls."""

import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.emulate.arm64.core import Core
from exporter.foundation.cache import scratch_folder
from exporter.foundation.errors import MissingDependencyError, RuntimeCrashError

QEMU = ("qemu-aarch64-static", "qemu-aarch64")
INSTALL_QEMU = "install it: apt-get install qemu-user-static (Debian, Ubuntu) or qemu-user-static of your distribution"
# Any machine that runs the emulation has as many; libraries size their tables by it.
CORES_SHOWN = 2
SHOWN_CHARACTERS = 300
# An isolated Python finds packages only in its own folders and in the one that is added here.
START = (
    "import runpy, sys; del sys.argv[0]; sys.path.append(sys.argv.pop(0)); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


class IllegalInstructionError(RuntimeCrashError):
    """A program executed an instruction that the core does not have."""


def qemu() -> str:
    """Return the path of QEMU's user mode emulator.

    Raises:
        MissingDependencyError: there is none.
    """
    for name in QEMU:
        path = shutil.which(name)
        if path is not None:
            return path
    raise MissingDependencyError("QEMU's user mode emulation of ARM64 is not installed", next_step=INSTALL_QEMU)


@dataclass(frozen=True)
class EmulatedMachine:
    """A core to run programs on, with the system files that they see.

    Attributes:
        core: The core.
        root: The root of an ARM64 system; its own /proc/cpuinfo is ignored.
        packages: A folder in which Python looks for packages.
    """

    core: Core
    root: Path
    packages: Path

    def python(self, program: Path, arguments: Sequence[Path | str], timeout_s: float) -> str:
        """Run a Python program that needs only the standard library and `packages`; see `run`."""
        start: list[Path | str] = [self.root / "usr/bin/python3", "-I", "-B", "-c", START]
        return self.run([*start, self.packages.absolute(), program, *arguments], timeout_s)

    def run(self, command: Sequence[Path | str], timeout_s: float) -> str:
        """Run a program and return what it wrote to standard output.

        Args:
            command: An ARM64 program and its arguments.
            timeout_s: Seconds after which it is killed.

        Raises:
            IllegalInstructionError: it executed an instruction that the core does not have.
            RuntimeCrashError: it failed in another way, or took too long.
            MissingDependencyError: QEMU is not installed.
        """
        emulator = qemu()
        with scratch_folder() as scratch:
            prefix = self._prefix(scratch / "system")
            line = [emulator, "-cpu", self.core.model, "-L", prefix, "-E", "LD_LIBRARY_PATH=", *command]
            with subprocess.Popen(
                list(map(str, line)), cwd=scratch, text=True, errors="replace",
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            ) as process:  # fmt: skip
                # QEMU would write the memory of a program that died into a file.
                resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
                try:
                    output, errors = process.communicate(timeout=timeout_s)
                except BaseException as error:
                    process.kill()
                    if isinstance(error, subprocess.TimeoutExpired):
                        raise self._crash(f"no end after {timeout_s:g} s") from None
                    raise
        if process.returncode != 0:
            raise self._failure(process.returncode, errors)
        return output

    def _prefix(self, folder: Path) -> Path:
        """Make the folder in which QEMU looks up absolute paths first: the root, with the core's own /proc/cpuinfo.

        Libraries would parse the host's file as that of an Arm and fail.
        """
        (folder / "proc").mkdir(parents=True)
        (folder / "proc/cpuinfo").write_text(self.core.cpuinfo(CORES_SHOWN), encoding="ascii")
        for name in ("etc", "lib", "usr"):
            (folder / name).symlink_to((self.root / name).absolute())
        return folder

    def _failure(self, code: int, errors: str) -> RuntimeCrashError:
        # A static emulator dies of its program's signal; another may exit with the shell's code for it.
        number = -code if code < 0 else code - 128
        if number == signal.SIGILL:
            return IllegalInstructionError(
                f"the emulated {self.core.name} met an instruction that it does not have (SIGILL)",
                next_step="the program was built for other cores than the device's",
            )
        ended = f"signal {signal.Signals(number).name}" if number in set(signal.Signals) else f"exit code {code}"
        last = re.sub(r"[^ -~]+", " ", " / ".join(errors.strip().splitlines()[-2:]))[-SHOWN_CHARACTERS:]
        return self._crash(f"{ended}: {last}" if last else ended)

    def _crash(self, got: str) -> RuntimeCrashError:
        return RuntimeCrashError(f"a program died on the emulated {self.core.name}", got=got, expected="its answer")
