"""The weight formats of GGUF files: ggml's types, encoded and decoded by ggml itself."""
