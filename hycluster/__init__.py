"""hycluster: one pool of vLLM engines under online and bulk traffic, on Ray.

Importing this package imports nothing heavy: vLLM, torch and Ray come in only where a
stop of the two journeys needs them (see docs/README.md).
"""

__version__ = "0.1.0"
