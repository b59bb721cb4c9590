"""Models as they come in: sources, families, lazy tensors, tokenizer."""
