"""Watches the routing of a service and re-places its experts."""
