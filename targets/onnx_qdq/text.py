"""Text is handled as in the target `onnx`."""

from exporter.targets.onnx.text import GenaiText

TEXT = GenaiText
