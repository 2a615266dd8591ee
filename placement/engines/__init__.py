"""Readers and writers of other engines' placement files."""
