"""What is counted, kept and exported: progress, the record of a run, metrics, logs without secrets.

Used by the driver; a worker uses it to look at its GPU. May import the output, whose folder keeps the records, and what
is below it.
"""
