"""A model out of a folder: its weights read, converted, expanded, adapters merged into them.

Used by the engine's process. May import the engine's layers, errors, imports and units.
"""
