"""How close the float32 artifacts of every family are to transformers; writes targets/parity.toml.

.venv/bin/python -m pytest tests/benchmarks/test_family_parity.py --timeout=0 -s
"""

from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

from exporter.model.family import families
from exporter.model.sources import open_model
from exporter.prove.accuracy import Reference, distance
from exporter.targets.contract import load_target
from exporter.targets.facts import facts_of
from exporter.targets.opened import OpenedArtifact
from tests.models import tiny_model

FILE = Path(__file__).parents[2] / "targets/parity.toml"
# Targets of floating-point activations: the third rounds them.
TARGETS = ("gguf", "onnx")
LENGTH, LAYERS, SEEDS = 96, 5, 3
ON = (
    f"the largest of {SEEDS} models of random weights, {LAYERS} layers, texts of {LENGTH} random tokens, beyond the "
    "windows that targets carry"
)
HEAD = f"""schema_version = 1
basis = "measured"
on = "{ON}"
command = ".venv/bin/python -m pytest tests/benchmarks/test_family_parity.py --timeout=0 -s"
date = "{date.today().isoformat()}"
"""


def measured(folder: Path, model_type: str, target: str, seed: int) -> float:
    """Return the mean KL divergence of a tiny model's float32 artifact, in nats."""
    made = folder / f"{model_type}-{target}-{seed}"
    source = tiny_model(made / "model", model_type, layers=LAYERS, tied=False, seed=seed)
    (made / "artifact").mkdir()
    tokens = np.random.default_rng(seed).integers(2, 300, (2, LENGTH))
    with open_model(str(source)) as model:
        artifact = load_target(target).write_float(model, made / "artifact")
        reference = Reference.of(model, tokens[:, : model.decoder.context_length])
    with OpenedArtifact(artifact, LENGTH, 1, exact=True) as opened:
        return max(0.0, distance(reference, opened.logits).kl_mean)


def test_float32_artifacts_are_the_model(tmp_path: Path) -> None:
    text = HEAD
    for target in TARGETS:
        runtime = ", ".join(f"{name} {version(name)}" for name in facts_of(target).runtime_libraries)
        text += f'\n[targets.{target}]\nruntime = "{runtime}"\n\n[targets.{target}.kl_mean]\n'
        for family in sorted(families().values(), key=lambda one: one.model_type):
            if load_target(target).lacks(family) is None:
                kl = max(measured(tmp_path, family.model_type, target, seed) for seed in range(SEEDS))
                print(f"{family.model_type} {target}: {kl:.1e}")
                assert kl < load_target(target).most_lowering_kl(family)
                text += f"{family.model_type} = {kl:.1e}\n"
    FILE.write_text(text, "utf-8")
