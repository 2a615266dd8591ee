"""Beside a running engine: fetch its routing, ask whether another placement pays, write the next file."""
