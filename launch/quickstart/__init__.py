"""The quickstart: profile, place, serve, compare, report."""
