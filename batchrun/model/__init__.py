"""A model's folder: found, checked, fingerprinted; its tokenizer; what it takes of memory.

Used by the driver, which pins the fingerprint, and by workers, which compare it. May import job, and dataset to reach
remote stores.
"""
