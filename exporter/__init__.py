"""Edge exporter: compress a language model, lower it to an edge runtime, prove it, pack it for a device.

Read `exporter.pipeline` first: it holds the whole job on one screen. `__all__` is the public API; everything else may
change from version to version.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.bundle.verify import verify_bundle as verify
    from exporter.foundation.errors import CheckError, ExporterError, InputError, MissingDependencyError, RequestError
    from exporter.pipeline import Bundle, build, plan
    from exporter.planning.job import Job
    from exporter.planning.outline import Outline
    from exporter.planning.plan import Plan, read_plan

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "CheckError",
    "ExporterError",
    "InputError",
    "Job",
    "MissingDependencyError",
    "Outline",
    "Plan",
    "RequestError",
    "__version__",
    "build",
    "plan",
    "read_plan",
    "verify",
]
# Imported when it is asked for: most of it brings torch along.
_PLACES = {
    "Bundle": "exporter.pipeline",
    "CheckError": "exporter.foundation.errors",
    "ExporterError": "exporter.foundation.errors",
    "InputError": "exporter.foundation.errors",
    "Job": "exporter.planning.job",
    "MissingDependencyError": "exporter.foundation.errors",
    "Outline": "exporter.planning.outline",
    "Plan": "exporter.planning.plan",
    "RequestError": "exporter.foundation.errors",
    "build": "exporter.pipeline",
    "plan": "exporter.pipeline",
    "read_plan": "exporter.planning.plan",
    "verify": "exporter.bundle.verify:verify_bundle",
}

# Libraries that we load report to their makers unless this is in the environment before they are imported: ONNX Runtime
# looks up a host of Microsoft's and writes a device id into the user's cache. Child processes inherit it.
os.environ |= {"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "ORT_DISABLE_TELEMETRY": "1"}


def __getattr__(name: str) -> Any:
    """Import a name of the public API."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    """Return the names of the public API."""
    return list(__all__)
