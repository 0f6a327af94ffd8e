"""What Kubernetes is told of the settings; see ``docs/kubernetes.md``."""
