"""Exact models: integer programs, constraint programming, dynamic programming."""
