"""An engine's process as its parents see it: started, handed over, spoken to, and what it said at its end.

Used by the driver, workers and the engine's process. May import the engine's protocol and errors.
"""
