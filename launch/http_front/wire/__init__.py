"""What all routes of the HTTP front share: bodies, errors, metrics."""
