"""Text is what it is for the target `onnx`."""

from exporter.targets.onnx.text import GenaiText

TEXT = GenaiText
