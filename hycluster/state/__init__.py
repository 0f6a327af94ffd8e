"""The state of the cluster: what the page, ``hycluster status`` and ``hycluster top`` show."""
