"""Token ids in, token ids out: the engines, and the process that one of them lives in.

`server` runs in the engine's process and `process` in the worker's, which starts it. May import nothing of batchrun but
errors: no files, no Parquet, no Dask.
"""
