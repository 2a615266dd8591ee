"""Searches among placements in which experts have several replicas."""
