"""GGUF files for llama.cpp, Ollama and whatever else is built on them."""
