"""Engines: one small protocol (protocol.py), the real one (vllm.py) and a timing model (simulated.py)."""
