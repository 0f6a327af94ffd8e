"""Soft state of all pools, and the pure policies that size them."""
