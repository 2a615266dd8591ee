"""What `solve`, `compare` and `stats` compute and print."""
