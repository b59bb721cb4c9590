"""Input models: sources, families, lazy tensors, tokenizer."""
