"""What it takes to serve a model: from its ``config.json`` and a GPU's name to layouts, room and bounds on speed.

The way through: ``families.py`` (configuration to shape), ``architecture.py`` (shape to parameters and KV cache),
``precision.py`` (numbers to bytes), ``shares.py`` (what one GPU holds), ``rules.py`` (which layouts vLLM can do),
``speed.py`` (bounds), ``layouts.py`` (the search), ``offload.py``, ``plan.py`` (all of it), ``report.py`` and
``write.py`` (out). Nothing here loads a model or imports torch.
"""
