"""Responses that outlive their request: kept in the batches' store, found again at every ingress process.

A layer before vLLM's app, which is asked without any state: what came before is put into the request's ``input``, and
its answers are kept here. On the way of a request: app (what is asked and what of it is kept) -> vLLM's app, for one in
the background by background (who answers it, and who does when that process dies) -> store. routes answers what asks
for one that is kept.
"""
