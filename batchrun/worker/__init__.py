"""A worker's process: one partition read, prompted, generated, staged and sealed."""
