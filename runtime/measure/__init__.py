"""Replay of recorded routing, and calibration of the running ranks."""
