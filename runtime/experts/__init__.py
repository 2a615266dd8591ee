"""Expert weights of a rank, and their products."""
