"""ONNX Runtime runs QDQ graphs too: it fuses each product with the quantisers around it."""

from exporter.targets.onnx.runtime import OnnxRuntime

RUNTIME = OnnxRuntime
