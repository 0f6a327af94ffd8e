"""Texts longer than the context: split, summarized level by level."""
