"""How many pods, how large and how long they end: what the settings say of it."""

from __future__ import annotations

from typing import Any

import pytest

from hycluster.errors import SettingsError
from hycluster.k8s.patches import beside, pods_patch
from hycluster.k8s.sizes import PodGroup, deletion_delay_s, drain_s, grace_s, groups
from hycluster.settings.read import validate
from hycluster.settings.settings import Settings

H20 = {"accelerator": "H20", "cpus": 8}


def settings(*models: dict[str, Any], **others: Any) -> Settings:
    named = [{"name": f"m{index}", "source": "/models/m"} | model for index, model in enumerate(models)]
    return validate(Settings, {"models": named, "ingress": {"replicas": 2}, **others}, "test")


def group(**model: Any) -> PodGroup:
    (found,) = groups(settings(model))
    return found


def shape(**model: Any) -> tuple[int, int, int]:
    found = group(**model)
    return found.hosts, found.gpus, found.cpus


@pytest.mark.parametrize(
    ("model", "hosts_gpus_cpus"),
    [
        ({"hardware": {"cpus": 1}}, (1, 0, 2)),
        ({"hardware": {"cpus": 2}, "parallel": {"tensor": 2}}, (1, 0, 5)),
        ({"hardware": {"cpus": 2, "placement": "strict_spread"}, "parallel": {"data": 2}}, (2, 0, 3)),
        ({"hardware": H20, "parallel": {"tensor": 4}}, (1, 4, 16)),
        ({"hardware": H20, "parallel": {"tensor": 8, "data": 2}}, (2, 8, 16)),
        ({"hardware": H20, "parallel": {"tensor": 2, "data": 4}}, (1, 8, 64)),
        ({"hardware": H20 | {"placement": "spread"}, "parallel": {"tensor": 2, "data": 4}}, (4, 2, 16)),
        ({"hardware": H20, "parallel": {"tensor": 8, "pipeline": 2}}, (2, 8, 8)),
    ],
)
def test_a_replica_is_laid_over_pods(model: dict[str, Any], hosts_gpus_cpus: tuple[int, int, int]) -> None:
    assert shape(**model) == hosts_gpus_cpus


def test_memory_is_what_the_settings_name_and_what_works_beside_it() -> None:
    assert group(hardware={"kv_cache_gib": 2}).memory_gib == 2 + 4 + 2
    assert group(hardware={"kv_cache_gib": 2, "memory_gib": 9}).memory_gib == 2 + 9 + 2
    assert group(hardware=H20, parallel={"tensor": 4}).memory_gib == 4 * 32
    assert group(hardware=H20 | {"kv_offload_gib": 100}, parallel={"tensor": 8}).memory_gib == 8 * 32 + 100
    assert group(hardware=H20 | {"memory_gib": 400}, parallel={"tensor": 8, "data": 2}).memory_gib == 200 + 2


def test_replicas_and_a_successor() -> None:
    found = group(replicas={"min": 1, "max": 4, "initial": 2})
    assert (found.least, found.first, found.most) == (1, 2, 5)


def test_each_end_is_above_the_one_within_it() -> None:
    some = settings({}, drain_timeout_s=300)
    assert 300 + 15 < drain_s(some) < grace_s(some)
    assert deletion_delay_s(some) >= 300 + 15


def test_several_models_have_pods_of_their_own() -> None:
    one, other = groups(
        settings(
            {"name": "Org/Large-1", "hardware": H20, "parallel": {"tensor": 8}},
            {"name": "small", "hardware": {"accelerator": "L4"}, "replicas": {"min": 2}},
        )
    )
    assert (one.name, other.name) == ("engines-org-large-1", "engines-small")
    assert one.resources == {"CPU": "16", "GPU": "8", "accelerator_type:H20": "1", "engines-org-large-1": "1"}
    assert other.node_selector == {"nvidia.com/gpu.product": "NVIDIA-L4"}


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ([{"hardware": {"accelerator": "A100"}}], "hardware.node_selector: must be set for accelerator 'A100'"),
        ([{"hardware": H20}, {}], "some are on GPUs and some on CPU"),
        ([{"name": "a/b"}, {"name": "a.b"}], "two names become 'a-b'"),
        ([{"hardware": H20, "parallel": {"tensor": 4, "data": 3}}], "must be a multiple of 2"),
        ([{"hardware": H20, "parallel": {"tensor": 12}}], "multiple of hardware.gpus_per_node (8)"),
        (
            [{"hardware": H20 | {"placement": "strict_pack"}, "parallel": {"tensor": 8, "data": 2}}],
            "strict_pack needs 16 GPUs",
        ),
    ],
)
def test_what_no_pods_can_be_made_for_is_said(models: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(SettingsError) as error:
        groups(settings(*models))
    assert said in error.value.message


def test_nodes_of_any_accelerator_may_be_named() -> None:
    labels = {"cloud.example.com/gpu": "a100-80"}
    assert group(hardware={"accelerator": "A100", "node_selector": labels}).node_selector == labels


def budgets(some: Settings) -> dict[str, int]:
    made = [each for each in beside(some, "x") if each["kind"] == "PodDisruptionBudget"]
    return {each["metadata"]["name"]: each["spec"]["minAvailable"] for each in made}


def test_one_of_several_may_go_and_the_only_one_stays() -> None:
    large = {"hardware": H20, "parallel": {"tensor": 8, "data": 2}}
    assert budgets(settings(large)) == {"x-ingress": 1, "x-engines": 2}
    assert budgets(settings(large | {"replicas": {"min": 3}}, ingress={"replicas": 4})) == {
        "x-ingress": 3,
        "x-engines": 4,
    }
    assert budgets(settings({"replicas": {"min": 0, "max": 2}})) == {"x-ingress": 1}


def test_an_object_store_needs_its_secret_and_a_way_there() -> None:
    def asked(store: str | None) -> tuple[list[Any], list[str]]:
        some = settings({}, batches={"store": store})
        secrets = [op["value"] for op in pods_patch(some) if op["path"].endswith("/envFrom")]
        return secrets, [each["metadata"]["name"] for each in beside(some, "x") if each["kind"] == "NetworkPolicy"]

    assert asked("s3://bucket/b") == ([[{"secretRef": {"name": "hycluster-s3", "optional": True}}]], ["x-batches"])
    assert asked("/shared/batches") == ([], [])
