"""A row to token ids and back: template, chat template, limits, detokenizer.

Used by workers for every row, and by the driver to try the prompt on the first rows. May import the engine's protocol,
model and job; knows neither Parquet files nor the output.
"""
