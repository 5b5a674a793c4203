"""A worker's process: one partition read, prompted, generated, staged and sealed.

Runs inside a Dask worker and drives one engine process. May import Dask, dataset, prompt, engine, output and telemetry;
the driver imports it to submit its functions.
"""
