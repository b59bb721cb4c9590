"""Run a decoder under ONNX Runtime and save its logits: a standalone program for any CPU that has both libraries.

It imports nothing from the exporter but `session.py` beside it, so that an emulated machine only needs numpy and
onnxruntime:

    python emulated_main.py REQUEST LOGITS

REQUEST is a JSON file: `tokens`, `single` (number of last tokens that are run one at a time, with the cached keys and
values of those before), `threads`, and `model` with its `path`, `head_width` and session `options`. LOGITS becomes a
.npy file, float32 [tokens, vocab].
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np

SESSION = Path(__file__).with_name("session.py")
# Spinning threads of an emulated CPU would slow down those that work.
IDLE = {"session.intra_op.allow_spinning": "0"}


def run(model: dict[str, Any], tokens: list[int], single: int, threads: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Return the logits after each token, float32 [tokens, vocab]."""
    opened = runpy.run_path(str(SESSION))["Session"]
    session = opened(model["path"], model["head_width"], threads, {**IDLE, **model["options"]})
    start = len(tokens) - single
    parts, done = [], 0
    for end in [start] * (start > 0) + list(range(start + 1, len(tokens) + 1)):
        parts.append(session.read(tokens[done:end]).numpy()[0])
        done = end
    return np.concatenate(parts).astype(np.float32, copy=False)


def main() -> None:
    """Run the request."""
    asked, made = map(Path, sys.argv[1:])
    request = json.loads(asked.read_text(encoding="utf-8"))
    values = run(request["model"], request["tokens"], request["single"], request["threads"])
    np.save(made, values, allow_pickle=False)


if __name__ == "__main__":
    main()
