"""The serving engine of one rank: requests, batches, passes, sampling."""
