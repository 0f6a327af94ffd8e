"""Rules of Ray's pods: how they end, and what Ray must be told in them."""

from __future__ import annotations

from collections.abc import Iterator

from hycluster.k8s.pods import All, Broken, Pod, quantity

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
MEMORY_MONITOR = "RAY_memory_monitor_refresh_ms"
USAGE = "RAY_USAGE_STATS_ENABLED"
# Between the end of Ray's drain and the kill: Ray ends its processes.
STOP_MARGIN_S = 15
CONTROL = ("head", "ingress", "redis")


def is_control(pod: Pod) -> bool:
    return pod.role in CONTROL


def pre_stop_s(pod: Pod) -> float:
    command = (pod.main.get("lifecycle") or {}).get("preStop", {}).get("exec", {}).get("command") or []
    return float(command[1]) if command[:1] == ["sleep"] and len(command) > 1 else 0.0


def _ends_in_time(pod: Pod, _all: All) -> Iterator[Broken]:
    if not pod.group:
        return
    drain_s = float(pod.env.get(DRAIN) or 30)
    needs_s, has_s = pre_stop_s(pod) + drain_s + STOP_MARGIN_S, pod.spec.get("terminationGracePeriodSeconds", 30)
    if has_s < needs_s:
        yield Broken(
            "spec.terminationGracePeriodSeconds",
            str(has_s),
            f"be {needs_s:g} or more: preStop {pre_stop_s(pod):g}, drain {drain_s:g}, end {STOP_MARGIN_S}",
            "the pod is killed while it drains",
        )


def _object_store_fits(pod: Pod, _all: All) -> Iterator[Broken]:
    """Ray takes a third of the memory for it by itself, and the disk where /dev/shm is smaller than that."""
    if not pod.group:
        return
    mount = next((m["name"] for m in pod.main.get("volumeMounts") or () if m["mountPath"] == "/dev/shm"), None)
    there = 0.0
    for volume in pod.spec.get("volumes") or ():
        if volume["name"] == mount and (volume.get("emptyDir") or {}).get("medium") == "Memory":
            there = quantity(volume["emptyDir"].get("sizeLimit", 0))
    wanted = (pod.group.get("rayStartParams") or {}).get("object-store-memory")
    if wanted is None or int(wanted) > there:
        yield Broken(
            "../rayStartParams.object-store-memory",
            str(wanted),
            f"be set, and fit /dev/shm ({there / (1 << 30):g} GiB)",
            "Ray takes a third of the memory, and then the disk",
        )


def _no_usage_statistics(pod: Pod, _all: All) -> Iterator[Broken]:
    if pod.group and pod.env.get(USAGE) != "0":
        yield Broken(
            f"spec.containers[0].env[{USAGE}]",
            repr(pod.env.get(USAGE)),
            'be "0"',
            "Ray reports the cluster to its makers, through a network that is closed",
        )


def _no_memory_monitor(pod: Pod, _all: All) -> Iterator[Broken]:
    if pod.group and pod.owner.startswith("RayService") and pod.env.get(MEMORY_MONITOR) != "0":
        yield Broken(
            f"spec.containers[0].env[{MEMORY_MONITOR}]",
            repr(pod.env.get(MEMORY_MONITOR)),
            'be "0"',
            "Ray's monitor would kill Serve's controller or an ingress process first; hycluster looks itself",
        )


RULES = (_ends_in_time, _object_store_fits, _no_usage_statistics, _no_memory_monitor)
