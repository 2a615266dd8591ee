"""Checkpoints whose experts are read in the bits that a plan gives them: kept so, or only rounded so."""
