"""Which sequences run next, and which pages they hold: no device is needed for it.

Used by the engine's process. May import the engine's protocol and errors.
"""
