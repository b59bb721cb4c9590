"""The memory that `plan` predicts of the runtimes against what they take, with the demo model on this machine.

Fitted were Q4_0, int4 and int8 of this shape, among others, at contexts of 512 to 1024 with weights of no meaning; not
fitted were Q4_K_M, Q8_0, and contexts of 2048 and 8192. The longest prompts take minutes.
"""

from pathlib import Path

import numpy as np
import pytest

from exporter.compress.compression import Compression
from exporter.model.sources import open_model
from exporter.targets.contract import load_target, lower
from exporter.targets.opened import OpenedArtifact

CONTEXTS = (512, 2048, 8192)
DECODED = 8
MOST_OFF = 0.1


@pytest.mark.parametrize(
    ("target", "type"), [("gguf", "Q4_0"), ("gguf", "Q4_K_M"), ("gguf", "Q8_0"), ("onnx", "int4"), ("onnx", "int8")]
)
def test_the_peak_is_predicted_within_a_tenth(tmp_path: Path, target: str, type: str) -> None:
    made = load_target(target)
    with open_model("demo") as model:
        decisions = made.decide(model, type, "rtn")
        artifact = lower(made, Compression(model, decisions), type, tmp_path).artifact
        predicted = [made.estimated_peak(model, decisions, context).bytes for context in CONTEXTS]
        vocabulary = model.decoder.vocab
    ratios = []
    for context, expected in zip(CONTEXTS, predicted, strict=True):
        prompt = np.random.default_rng(0).integers(20, vocabulary, context - DECODED - 1).tolist()
        with OpenedArtifact(artifact, context, 1) as child:
            measured = child.measure(prompt, DECODED, 1).peak_bytes
        ratios.append(expected / measured)
        print(f"\n{target} {type} {context:5}: predicted {expected / 1e6:6.1f} MB, {ratios[-1]:.3f} of what it took")
    assert all(abs(ratio - 1) <= MOST_OFF for ratio in ratios), ratios
