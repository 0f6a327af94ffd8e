"""The page at ``/ui``: pools, traffic, batches, where a request's time went, and a playground."""
