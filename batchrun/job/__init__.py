"""The job file: typed sections, validation, and the hash of what decides the outputs.

Used by every process but the engine's, which gets an EngineSpec. May import nothing but errors and hashing.
"""
