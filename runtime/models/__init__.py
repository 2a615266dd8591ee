"""Attention, norms and routers of the supported architectures; no communication."""
