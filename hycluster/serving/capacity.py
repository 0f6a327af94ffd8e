"""What can never be placed on the nodes of a Ray cluster, whatever else runs there. Pure functions.

Ray itself places nothing twice: what no node has room for waits for ever, without a word. Sums over the cluster
(``hycluster/serving/resources.py``) do not see that three replicas of 2 CPUs do not go on two nodes of 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hycluster.errors import SettingsError
from hycluster.replica.placement import bundles, reserved, strategy
from hycluster.settings.model import Model

Resources = Mapping[str, float]
# Ray counts in ten thousandths.
SLACK = 1e-6
GIB = 1 << 30
FIELDS = {"CPU": "hardware.cpus", "GPU": "hardware.accelerator", "memory": "hardware.memory_gib"}


def check_places(models: Sequence[Model], nodes: Sequence[Resources]) -> None:
    """Refuse replicas that no nodes like these can hold.

    Args:
        nodes: what each node has in all, by Ray's names of resources.

    Raises:
        SettingsError: names the field, what one process asks for and what the nodes have.
    """
    for model in models:
        if model.replicas.count:
            _check_places(model, nodes)


def _check_places(model: Model, nodes: Sequence[Resources]) -> None:
    parts = bundles(model) or [reserved(model)]
    kind = strategy(model) if len(parts) > 1 else "PACK"
    if kind == "STRICT_PACK":
        parts = [reserved(model)]
    for part in parts:
        if not any(_times(part, node) for node in nodes):
            raise _refusal(
                model, part, nodes, "one node must hold" if kind == "STRICT_PACK" else "one process asks for"
            )
    if kind == "STRICT_SPREAD":
        fitting = sum(all(_times(part, node) for part in parts) for node in nodes)
        if fitting < len(parts):
            raise SettingsError(
                f"models: {model.name}: hardware.placement: 'strict_spread' asks for {len(parts)} nodes a replica;"
                f" this Ray cluster has {fitting} that are large enough"
            )
    # As many as there is room for, were there nothing else.
    dearest = max(parts, key=lambda part: sum(part.values()))
    like_it = [part for part in parts if part == dearest]
    places = sum(_times(dearest, node) for node in nodes)
    asked = len(like_it) * model.replicas.count
    if places < asked:
        field = FIELDS.get(_scarce(dearest, nodes), "hardware")
        raise SettingsError(
            f"models: {model.name}: {field}: {asked} processes of {_told(dearest)} each are asked for; the"
            f" nodes of this Ray cluster have room for {places} ({_nodes_told(dearest, nodes)})"
        )


def _times(part: Resources, node: Resources) -> int:
    """How often a reservation goes on a node."""
    return min(
        (int((node.get(name, 0.0) + SLACK) / amount) for name, amount in part.items() if amount), default=1 << 30
    )


def _scarce(part: Resources, nodes: Sequence[Resources]) -> str:
    """The resource that keeps more of these from having a place."""
    return min(part, key=lambda name: sum(_times({name: part[name]}, node) for node in nodes))


def _refusal(model: Model, part: Resources, nodes: Sequence[Resources], asks: str) -> SettingsError:
    name = _scarce(part, nodes)
    most = max((node.get(name, 0.0) for node in nodes), default=0.0)
    unit = GIB if name == "memory" else 1
    return SettingsError(
        f"models: {model.name}: {FIELDS.get(name, name)}: {asks} {_told(part)}; the largest node of this Ray"
        f" cluster has {most / unit:g} {name}{' GiB' if name == 'memory' else ''}"
    )


def _told(part: Resources) -> str:
    return " and ".join(
        f"{amount / GIB:g} memory GiB" if name == "memory" else f"{amount:g} {name}s"
        for name, amount in part.items()
        if name in FIELDS and amount
    )


def _nodes_told(part: Resources, nodes: Sequence[Resources]) -> str:
    name = _scarce(part, nodes)
    unit = GIB if name == "memory" else 1
    return f"{name}{' GiB' if name == 'memory' else ''}: {', '.join(f'{n.get(name, 0.0) / unit:g}' for n in nodes)}"
