"""The driver's process: it prepares a run, hands its partitions to Dask, and writes the manifest."""
