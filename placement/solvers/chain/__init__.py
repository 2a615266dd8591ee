"""The chain of layers of the coherent objective."""
