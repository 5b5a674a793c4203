"""Parquet footers to partitions; a partition to record batches."""
