"""What the command line calls, one module a command."""
