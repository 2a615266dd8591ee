"""What `serve` runs: a file of requests, or a service behind HTTP."""
