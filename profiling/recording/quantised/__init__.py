"""Quantised weights: how matrices are stored in few bits, and the numbers that they stand for."""
