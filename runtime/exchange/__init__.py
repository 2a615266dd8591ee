"""The execution modes: how tokens reach their experts and results come back."""
