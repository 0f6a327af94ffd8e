"""Settings: YAML in, frozen models out; a file a topic."""
