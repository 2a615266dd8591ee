"""Keys and values of sequences: cache, and their exchange between ranks."""
