"""Windows on the routing that a serving engine has seen lately: loads, and the rows of whole tokens."""
