"""Token ids in, token ids out: the engines, and the process that one of them lives in.

`server` runs in the engine's process; `processes` has what starts it and speaks to it, in the worker's. May import
nothing of batchrun but errors: no files, no Parquet, no Dask.
"""
