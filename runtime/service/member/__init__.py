"""A member of a service: the process of one rank."""
