"""What the command line calls, one module a command.

Used by the process that the user started. May import every other package except the command line itself.
"""
