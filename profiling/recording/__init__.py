"""Recording the routing of a real model: the only place on this floor that knows torch."""
