"""Structured answers: a JSON Schema, a regular expression or a list of choices as an automaton over bytes, and over the
tokens of a vocabulary; the Arrow type of the answers, and their values.

Knows no files, no engine and no job.
"""
