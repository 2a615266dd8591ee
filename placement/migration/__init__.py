"""How to get from one placement to another: ordered rounds of transfers, their bytes and seconds."""
