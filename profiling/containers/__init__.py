"""Readers of other programs' containers, which execute nothing they contain."""
