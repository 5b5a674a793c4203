"""What every rank does on its device: the compiled model, its pages, batches as arrays, tokens.

Used by the engine's process. May import `attention`, `schedule` and the engine's weights, layers and tokens.
"""
