"""Edge exporter: compress a language model, lower it to an edge runtime, prove it, pack it for a device.

Read `exporter.pipeline` first: it holds the whole job on one screen.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout, `targets` and `devices` stand beside this package; the wheel maps them into it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "targets").is_dir():
    __path__.append(str(_checkout))
