"""What a trace says about skew, affinity, locality and change."""
