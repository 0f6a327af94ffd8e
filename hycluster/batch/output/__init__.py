"""From answered rows to shards committed exactly once, and the proof of it."""
