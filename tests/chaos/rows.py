"""What the harness and its engine, in another process, agree on."""

ROOM = 48
"""Rows that the engine has in hand at most."""
OUTSIZE, DEADLY = "outsize", "deadly"
"""Words in a row's text: it fits no device, it kills the engine."""
