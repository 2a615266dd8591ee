"""A service: requests in, tokens out, while ranks come, go and fail."""
