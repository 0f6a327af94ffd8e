"""Model families that hycluster brings to vLLM, as a plugin (``hycluster.models.plugin``)."""
