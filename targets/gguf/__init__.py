"""GGUF files for llama.cpp, Ollama and other software built on them."""
