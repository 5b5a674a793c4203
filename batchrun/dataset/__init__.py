"""Parquet footers to partitions; a partition to record batches.

Used by the driver for the plan and by workers for rows. May import job and storage; knows nothing of prompts or models.
"""
