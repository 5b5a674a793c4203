"""A model's folder: found, fingerprinted, and its tokenizer.

Used by the driver, which pins the fingerprint, and by workers, which compare it. May import job, and dataset to reach
remote stores.
"""
