"""Seeded traces and workloads."""
