"""Edge exporter: compress a language model, lower it to an edge runtime, prove it, pack it for a device.

Read `exporter.pipeline` first: it holds the whole job on one screen.
"""

import os
from pathlib import Path

__version__ = "0.1.0"

# Libraries that we load report to their makers unless this stands in the environment before they are imported: ONNX
# Runtime asks for a host of Microsoft's and writes a device's id into the user's cache. Child processes inherit it.
os.environ |= {"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "ORT_DISABLE_TELEMETRY": "1"}

# In a checkout, `targets` and `devices` stand beside this package; the wheel maps them into it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "targets").is_dir():
    __path__.append(str(_checkout))
