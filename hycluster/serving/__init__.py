"""What ``hycluster serve`` does once Ray runs: waits for the start, tells of losses; and how other commands find it."""
