"""The commands about who may call: ``hycluster keys``, ``projects`` and ``limits``.

They work on the database of keys (``hycluster/auth``), whether or not a service runs; ``acted_on`` finds it.
"""
