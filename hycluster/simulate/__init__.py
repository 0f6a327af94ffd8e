"""Engines in virtual time: vLLM's own scheduler, stepped by a model of how long steps take."""
