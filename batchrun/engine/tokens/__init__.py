"""How a token is chosen, what an answer may hold, and what is told of it, for every engine.

Used by the engine's process. May import the engine's protocol and errors.
"""
