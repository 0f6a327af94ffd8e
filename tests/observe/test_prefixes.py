from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest

from hycluster.observe.catalogue import INGRESS
from hycluster.observe.prefixes import PrefixAudit, PrefixMetrics


@dataclass
class Followed:
    """A gateway's knowledge, by its counts."""

    audit: PrefixAudit = field(default_factory=PrefixAudit)
    blocks: int = 7


def test_what_a_scrape_reads() -> None:
    metrics, followed, registry = PrefixMetrics(), Followed(), CollectorRegistry()
    assert list(metrics.collect()) == []
    for predicted, found in ((96, 96), (96, 32), (0, 16), (0, 0)):
        followed.audit.note(predicted, found)
    metrics.watch("m", followed)
    registry.register(metrics)
    lines = generate_latest(registry).decode().replace(INGRESS, "me").splitlines()
    assert {line for line in lines if not line.startswith("#")} == {
        'hycluster_prefix_predictions_total{ingress="me",model="m"} 4.0',
        'hycluster_prefix_cached_tokens_total{ingress="me",model="m"} 144.0',
        'hycluster_prefix_error_tokens_total{ingress="me",kind="missing",model="m"} 64.0',
        'hycluster_prefix_error_tokens_total{ingress="me",kind="unforeseen",model="m"} 16.0',
        'hycluster_prefix_index_blocks{ingress="me",model="m"} 7.0',
    }
