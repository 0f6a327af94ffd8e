"""Limits that are true over all processes: what a key, a project or a tenant may use.

Each limit is a bucket. The directory keeps the book on all buckets (``book``, of ``bucket`` and ``slots``), and gives
each process leases for about a second's requests; what a process holds of a bucket is in ``holding``, and what keeps
both from losing anything with each other in ``lease``. On the way of a request: ``limiter`` finds the buckets that it
meets and reserves what it may use of each; ``reservation`` is settled at its end with what it did use. All but the
limiter is pure, and knows no clock of its own.
"""
