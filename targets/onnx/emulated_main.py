"""Run a decoder under ONNX Runtime and save its logits: a standalone program for any CPU that has both libraries.

It imports nothing from the exporter, so that an emulated machine only needs numpy and onnxruntime:

    python emulated_main.py REQUEST LOGITS

REQUEST is a JSON file: `tokens`, `single` (number of last tokens that are run one at a time, with the cached keys and
values of those before), `threads`, and `model` with its `path`, `head_width` and session `options`. LOGITS becomes a
.npy file, float32 [tokens, vocab].
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# Set before the import: otherwise ONNX Runtime contacts a host of its vendor and stores a device id in the home folder.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime


def run(model: dict[str, Any], tokens: list[int], single: int, threads: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Return the logits after each token, float32 [tokens, vocab]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Spinning threads of an emulated CPU would slow down those that work.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    for name, value in model["options"].items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(model["path"], options, providers=["CPUExecutionProvider"])
    inputs = {given.name: given.shape for given in session.get_inputs()}
    outputs = [made.name for made in session.get_outputs()]
    width = model["head_width"]
    past = {name: np.zeros((1, shape[1], 0, width), np.float32) for name, shape in inputs.items() if "past" in name}
    start = len(tokens) - single
    parts, done = [], 0
    for end in [start] * (start > 0) + list(range(start + 1, len(tokens) + 1)):
        feeds = {
            "input_ids": np.array([tokens[done:end]], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(done, end, dtype=np.int64)[None],
        }
        feeds = {name: value for name, value in feeds.items() if name in inputs} | past
        made = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        past = {name: made[name.replace("past_key_values", "present")] for name in past}
        parts.append(made["logits"][0])
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
