"""The driver's process: it prepares a run, hands its partitions to Dask, and writes the manifest.

Used by `batchrun.run` and `batchrun.retry`. May import the worker's tasks, which it submits, the cluster, and what is
below them; nothing but the commands imports it.
"""
