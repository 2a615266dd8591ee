"""Proven lower bounds, one module per kind of cost."""
