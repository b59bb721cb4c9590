"""The checks are those of the target `onnx`."""

from exporter.targets.onnx.intake import OnnxIntake

INTAKE = OnnxIntake()
