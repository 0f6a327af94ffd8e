"""What must hold of manifests and no API server looks at: each rule yields what breaks it.

Most of it is what KubeRay finds out later, or never, and what a cluster shows at 3 a.m.: a pod that is killed before it
has drained, a Service that selects nobody, a volume that is mounted and not there. A rule is a function of a pod, or of
a resource of a kind, and of all there is; it counts on what an API server has demanded (``schema.py``) already.
"""
