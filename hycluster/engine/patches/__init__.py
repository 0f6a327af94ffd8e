"""Every change of vLLM's or Ray's behaviour, one file each.

A patch makes code of theirs do something else than it says: it replaces a function or a method, wraps one, overrules a
decision, or does in a subclass what theirs refuses. Each file says what, why, the upstream issue and the version, and
refuses any other version (:mod:`hycluster.engine.patches.pinned`). Its test fails on the day the patch is no longer
needed. What hycluster merely uses of theirs is not here; ``docs/reaches.md`` lists both.

Nothing here imports another module of hycluster's but ``pinned``: the models' plugin, the engine, the ingress and the
logging take patches from here, and a process that has no use for vLLM must not pay for it.
"""
