"""Windows of rows sorted by length, in rectangles, through `model.generate`.

Used by the engine's process. May import the rest of the engine but `paged`.
"""
