"""Who calls, and what that one may do.

On the way of a request: guard (a credential becomes a caller: by keyring or tokens) -> caller (who it is; what the rest
of the house asks). On the way of a change: the commands (``hycluster/tenants``) -> store (tables, in a database) ->
keyring of each ingress process, which looks for changes.
"""
