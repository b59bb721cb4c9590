"""onnxruntime-genai's builder for families whose config.json it cannot read: an opponent that would otherwise fail.

    .venv/bin/python -m tests.benchmarks.shimmed_builder, and its own arguments

Weights, graph and quantisers are the builder's own. Its config is changed as the target `onnx` changes it: one flat
rotary embedding, and what the family's shim adds.
"""

import copy
from types import SimpleNamespace
from typing import Any

from onnxruntime_genai.models import builder
from transformers import PretrainedConfig

from exporter.model.family import families
from exporter.model.rotary import rope_parameters

STRUCTURED = (
    "builder_config_version", "target_options", "drafter_options", "speculative_options", "runtime_config", "search",
)  # fmt: skip


def readable(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config as the builder expects it."""
    onnx = families()[config.architectures[0]].onnx
    assert onnx is not None, f"{config.architectures[0]}: the builder has no class for it"
    original = copy.deepcopy(config)
    config.rope_parameters = dict(rope_parameters(original))
    onnx.shim(config, original)
    return config


def main() -> None:
    """Run the builder's command line."""
    read = builder.AutoConfig.from_pretrained
    builder.AutoConfig = SimpleNamespace(from_pretrained=lambda *given, **named: readable(read(*given, **named)))
    asked = builder.get_args()
    common = asked.model_name, asked.input, asked.output, asked.precision, asked.execution_provider, asked.cache_dir
    structured: dict[str, Any] = {name: getattr(asked, name) for name in STRUCTURED}
    builder.create_model(*common, **builder.parse_extra_options(*common, asked.extra_options, **structured))


if __name__ == "__main__":
    main()
