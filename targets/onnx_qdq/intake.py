"""What is let in is what it is for the target `onnx`."""

from exporter.targets.onnx.intake import OnnxIntake

INTAKE = OnnxIntake()
