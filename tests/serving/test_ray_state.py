"""What ``hycluster/serving/ray_state.py`` reaches for is in the installed Ray."""

from __future__ import annotations

import inspect
import socket
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.serve._private import constants, controller, deployment_state, replica
from ray.serve._private.common import ReplicaState
from ray.serve.config import ControllerOptions
from ray.serve.schema import DeploymentDetails, ReplicaDetails, ServeInstanceDetails

from hycluster.directory.starts import CONTROLLER_OPTIONS, ENDLESS
from hycluster.serving import ray_state


def test_what_the_controller_tells() -> None:
    assert {"controller_info", "applications"} <= ServeInstanceDetails.model_fields.keys()
    assert {"target_num_replicas", "status", "message", "replicas"} <= DeploymentDetails.model_fields.keys()
    assert {"replica_id", "pid", "node_ip", "actor_name", "state"} <= ReplicaDetails.model_fields.keys()
    states = {state.value for state in ReplicaState}
    assert states > ray_state.STARTED
    assert states - ray_state.STARTED == {"STARTING", "STOPPING", "STOPPED"}
    assert inspect.iscoroutinefunction(controller.ServeController.get_serve_instance_details) or callable(
        controller.ServeController.get_serve_instance_details
    )


def test_a_controller_that_has_just_begun_does_not_know_its_processes_yet() -> None:
    """It tells of each what it has read of its own state, and leaves the rest out."""
    told: dict[str, Any] = {"replica_id": "a", "start_time_s": 1.0}
    replicas = [
        ReplicaDetails(**told, state=ReplicaState.RECOVERING).model_dump(exclude_unset=True),
        ReplicaDetails(**{**told, "replica_id": "b"}, state=ReplicaState.STARTING).model_dump(exclude_unset=True),
    ]
    assert "pid" not in replicas[0]
    deployment = {"target_num_replicas": 2, "status": "UPDATING", "message": "", "replicas": replicas}
    details = {"controller_info": {}, "applications": {"x": {"deployments": {"d": deployment}}}}
    look = ray_state.read_details(details, "x")
    assert look.processes == {"a": ray_state.ServiceProcess("d", "a", None, "", "")}
    assert look.deployments == {"d": ray_state.Deployment(2, "UPDATING", "")}


def test_a_replica_can_be_stopped_past_the_controller() -> None:
    stop = inspect.signature(replica.ReplicaActor.perform_graceful_shutdown)
    assert all(p.default is not p.empty for p in list(stop.parameters.values())[1:])


def test_the_controller_tries_for_ever() -> None:
    """Its bound is the lesser of the deployment's and this variable's a replica."""
    ((variable, value),) = CONTROLLER_OPTIONS["runtime_env"]["env_vars"].items()
    assert ControllerOptions(**CONTROLLER_OPTIONS).runtime_env == CONTROLLER_OPTIONS["runtime_env"]
    assert int(value) == ENDLESS
    assert f'get_env_int("{variable}"' in Path(constants.__file__).read_text()
    threshold = inspect.getsource(vars(deployment_state.DeploymentState)["_failed_to_start_threshold"].fget)
    assert "min(" in threshold
    assert "max_constructor_retry_count" in threshold
    assert "MAX_PER_REPLICA_RETRY_COUNT" in threshold


def test_the_raylet_is_known_by_its_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    class Node:
        raylet_socket_name = str(tmp_path / "raylet")

    monkeypatch.setattr(ray._private.worker.global_worker, "node", Node, raising=False)
    assert ray_state.raylet_here() is None
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(Node.raylet_socket_name)
        server.listen()
        assert ray_state.raylet_here() == os.getpid()
