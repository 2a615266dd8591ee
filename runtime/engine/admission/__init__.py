"""Which waiting request gets the next place in a batch, where that need not be the first."""
