"""Commands, sweeps and services on a Ray cluster."""
