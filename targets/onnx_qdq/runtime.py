"""ONNX Runtime also runs QDQ graphs: it fuses each matrix multiplication with the quantisers around it."""

from exporter.targets.onnx.runtime import OnnxRuntime

RUNTIME = OnnxRuntime
