"""Structured answers: a JSON Schema, a regular expression or a list of choices as an automaton over bytes, and over the
tokens of a vocabulary; the Arrow type of the answers, and their values.

Used by the driver, which refuses what cannot be, and by workers, which check answers and write them typed. May import
nothing of batchrun but errors: no files, no engine, no torch.
"""
