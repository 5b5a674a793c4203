"""What a job will cost before it is run: a sample of its rows, a short trial, and what earlier runs took."""
