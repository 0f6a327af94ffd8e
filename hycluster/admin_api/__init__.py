"""OpenAI's admin API, ``/v1/organization/...``: projects, their keys, and the audit log, for the holders of a key with
the scope ``admin``.

On the way of a request: app (who manages what; errors) -> a module for each kind of thing -> administration (threads
that ask the database; ``hycluster/auth/admin_store.py``) -> objects (as OpenAI's API shows them).
"""
