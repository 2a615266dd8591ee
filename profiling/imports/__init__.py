"""Readers of other programs' routing traces and expert loads, one module per program."""
