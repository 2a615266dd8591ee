"""The expert-parallel runtime on torch.distributed: serves a placement, one process per rank."""
