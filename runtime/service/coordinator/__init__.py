"""The coordinator of a service: the process that is no rank."""
