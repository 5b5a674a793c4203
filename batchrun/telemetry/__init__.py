"""What is counted, kept and exported."""
