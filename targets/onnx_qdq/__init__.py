"""ONNX models in QDQ form: static integers for NPUs, XNNPACK and ONNX Runtime."""
