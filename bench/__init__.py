"""Benchmarks: two things side by side in one call, ratios printed. Not tests; nothing here is timed by CI."""
