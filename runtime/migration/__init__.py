"""Experts change their places while their engine serves."""
