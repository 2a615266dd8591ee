"""Entry points: the command line, torchrun and Ray programs, reports."""
