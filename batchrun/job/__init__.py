"""The job file: typed sections, validation, and the hash of what decides the outputs."""
