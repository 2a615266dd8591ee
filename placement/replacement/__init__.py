"""When a placement is to change, and what it becomes when ranks join or leave."""
