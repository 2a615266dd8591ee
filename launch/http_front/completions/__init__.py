"""POST /v1/completions: body, run, answer."""
