"""Attention over whole heads: a file for each kind, and what all kinds share."""
