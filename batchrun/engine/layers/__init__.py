"""Layers that take the place of a model's own: in fp8, and experts by grouped products.

Used by the engine's process. May import errors.
"""
