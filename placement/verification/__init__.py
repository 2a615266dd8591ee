"""What a placement file claims, checked from files alone: this room shares no code with what made the claims."""
