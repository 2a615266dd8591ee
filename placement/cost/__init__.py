"""What a placement costs: evaluation by replay, the replica rule, and seconds."""
