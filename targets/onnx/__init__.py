"""ONNX models for ONNX Runtime and onnxruntime-genai."""
