"""OpenAI's Batch API over the machinery of batch jobs: files in, JSONL out, exactly once.

On the way of the data: routes (at the HTTP ingress) -> store (files) -> executor (one process) -> runner (one
batch, end to end) -> requests (JSONL to Parquet) -> lines (what becomes of one line) -> results
(parts to JSONL) -> store.
"""
