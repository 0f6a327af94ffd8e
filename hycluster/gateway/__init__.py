"""In every process that takes requests: the pool of engines as one vLLM engine client."""
