"""Attention over pages: the operator that models call, who computes it, and the kernels.

Used by the engine's process. May import `schedule` and errors.
"""
