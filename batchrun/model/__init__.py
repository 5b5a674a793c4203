"""A model's folder: found, fingerprinted, and its tokenizer."""
