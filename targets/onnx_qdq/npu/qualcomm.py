"""Qualcomm's compiler and emulator: the optional package that holds them, its version and its licence."""

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from exporter.foundation.errors import MissingDependencyError

EXTRA, PACKAGE, MODULE = "npu-qualcomm", "onnxruntime-qnn", "onnxruntime_qnn"
# Results depend on it: binaries name it, and the check's limits were measured with it.
VERSION = "2.7.0"
TERMS = "Qualcomm AI Stack License"
LICENCE = (
    "Qualcomm's libraries in it are under the AI Stack License (Qualcomm_LICENSE.pdf in the package), which is "
    "accepted by use: read it first, its covenant not to assert patents (section 4) included"
)
INSTALL = f"pip install 'edge-exporter[{EXTRA}]'"
# Host libraries are for x86-64 Linux with glibc 2.35 or newer.
PROVIDER = "QNNExecutionProvider"


def require_installed() -> None:
    """Require the package in the version that this exporter was tested with.

    Raises:
        MissingDependencyError: it is missing or of another version; the message names the licence.
    """
    if sys.platform != "linux":
        raise MissingDependencyError(f"{PACKAGE} has the emulator for Linux only", got=sys.platform)
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        found = None
    if found is None or importlib.util.find_spec(MODULE) is None:
        raise MissingDependencyError(
            f"the package {PACKAGE} is not installed", next_step=f"{INSTALL}; {LICENCE}"
        ) from None
    if found != VERSION:
        raise MissingDependencyError(
            f"the package {PACKAGE} is of another version", got=found, expected=VERSION,
            next_step=f"pip install {PACKAGE}=={VERSION}",
        )  # fmt: skip


def library() -> Path:
    """Return the execution provider's library."""
    import onnxruntime_qnn

    return Path(onnxruntime_qnn.get_library_path())


def register(runtime: Any) -> None:
    """Register the execution provider with onnxruntime or onnxruntime-genai in this process."""
    runtime.register_execution_provider_library(PROVIDER, str(library()))
