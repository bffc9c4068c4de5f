"""What is fast: commands that print one JSON line a measurement."""
