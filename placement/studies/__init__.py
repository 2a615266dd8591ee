"""What a placement is worth: held-out judgement, verdict, tokens needed, what carries over."""
