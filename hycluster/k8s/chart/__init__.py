"""The Helm chart, made from the files that kustomize builds from; see ``docs/kubernetes.md``."""
