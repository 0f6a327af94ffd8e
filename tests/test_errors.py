from __future__ import annotations

import http
import inspect
import pickle
import re
from pathlib import Path

import grpc
import pytest

from hycluster import errors
from hycluster.errors import HyclusterError

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
TREE = [kind for kind in CLASSES if issubclass(kind, HyclusterError)]


def test_one_tree() -> None:
    assert [kind for kind in CLASSES if issubclass(kind, BaseException)] == TREE


@pytest.mark.parametrize("kind", TREE)
def test_each_knows_its_statuses(kind: type[HyclusterError]) -> None:
    assert http.HTTPStatus(kind.http_status) >= 400
    assert kind.grpc_status in grpc.StatusCode.__members__
    assert kind.exit_code in (1, 2, 3, 4)
    assert kind.openai_type
    assert kind.__doc__


def test_statuses_of_the_contract() -> None:
    statuses = {kind.__name__: (kind.http_status, kind.grpc_status, kind.exit_code) for kind in TREE}
    assert statuses == {
        "HyclusterError": (500, "INTERNAL", 1),
        "InvalidInput": (400, "INVALID_ARGUMENT", 2),
        "TooManyMembers": (413, "INVALID_ARGUMENT", 2),
        "PromptTooLong": (400, "INVALID_ARGUMENT", 2),
        "ReplicaLost": (503, "UNAVAILABLE", 1),
        "KillsReplicas": (422, "FAILED_PRECONDITION", 1),
        "RequestFailed": (503, "UNAVAILABLE", 1),
        "SettingsError": (400, "INVALID_ARGUMENT", 2),
        "Unauthenticated": (401, "UNAUTHENTICATED", 2),
        "PermissionDenied": (403, "PERMISSION_DENIED", 2),
        "UnknownModel": (404, "NOT_FOUND", 2),
        "NotFound": (404, "NOT_FOUND", 1),
        "Overloaded": (429, "RESOURCE_EXHAUSTED", 1),
        "RateLimited": (429, "RESOURCE_EXHAUSTED", 1),
        "QuotaExhausted": (429, "RESOURCE_EXHAUSTED", 1),
        "Unavailable": (503, "UNAVAILABLE", 1),
        "DeadlineExceeded": (504, "DEADLINE_EXCEEDED", 1),
        "EngineStartFailed": (500, "INTERNAL", 1),
        "ClusterLost": (500, "INTERNAL", 4),
        "JobFailed": (500, "INTERNAL", 1),
        "TooManyQuarantined": (500, "INTERNAL", 3),
    }


def test_each_has_a_reason_of_its_own() -> None:
    # Callers compare them: one that is changed breaks its callers.
    assert {kind.__name__: kind.reason for kind in TREE} == {
        "HyclusterError": "INTERNAL",
        "InvalidInput": "INVALID_INPUT",
        "SettingsError": "SETTINGS",
        "PromptTooLong": "PROMPT_TOO_LONG",
        "TooManyMembers": "TOO_MANY_MEMBERS",
        "Unauthenticated": "UNAUTHENTICATED",
        "PermissionDenied": "PERMISSION_DENIED",
        "UnknownModel": "UNKNOWN_MODEL",
        "NotFound": "NOT_FOUND",
        "Overloaded": "OVERLOADED",
        "RateLimited": "RATE_LIMITED",
        "QuotaExhausted": "QUOTA_EXHAUSTED",
        "Unavailable": "UNAVAILABLE",
        "ReplicaLost": "REPLICA_LOST",
        "KillsReplicas": "KILLS_REPLICAS",
        "RequestFailed": "REQUEST_FAILED",
        "DeadlineExceeded": "DEADLINE_EXCEEDED",
        "ClusterLost": "CLUSTER_LOST",
        "EngineStartFailed": "ENGINE_START_FAILED",
        "JobFailed": "JOB_FAILED",
        "TooManyQuarantined": "TOO_MANY_QUARANTINED",
    }
    assert sorted(errors.BY_REASON) == sorted(kind.reason for kind in TREE)
    # The form of google.rpc.ErrorInfo.
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]{1,61}[A-Z0-9]", reason) for reason in errors.BY_REASON)


def test_callers_know_an_error_by_its_nearest_kind() -> None:
    class Own(errors.ReplicaLost, OSError):
        """One in a form that somebody's code wants."""

    assert errors.kind_of(Own("gone")) is errors.ReplicaLost
    assert Own("gone").reason == "REPLICA_LOST"


@pytest.mark.parametrize("kind", TREE)
def test_each_comes_whole_through_pickle(kind: type[HyclusterError]) -> None:
    error = errors.UnknownModel("a", ["b"]) if kind is errors.UnknownModel else kind("gone", retry_after_s=2)
    came = pickle.loads(pickle.dumps(error))
    assert (type(came), str(came), vars(came)) == (kind, str(error), vars(error))


def test_the_message_is_the_error() -> None:
    error = errors.Overloaded("busy", retry_after_s=1.5)
    assert (str(error), error.message, error.retry_after_s) == ("busy", "busy", 1.5)
    assert errors.Unavailable("gone").retry_after_s is None


def test_invalid_input_is_a_value_error() -> None:
    # So that pydantic reports it with the field it was raised for.
    assert issubclass(errors.InvalidInput, ValueError)


def test_unknown_model_names_those_served() -> None:
    assert str(errors.UnknownModel("a", ["b", "c"])) == "model: 'a' is not served here; served are 'b', 'c'"
    assert len(str(errors.UnknownModel("a" * 10_000, ["b"]))) < 200


@pytest.mark.parametrize(("value", "text"), [("a", "'a'"), (3, "3"), (None, "None")])
def test_short_values_are_shown_whole(value: object, text: str) -> None:
    assert errors.shown(value) == text


def test_long_values_are_cut() -> None:
    assert errors.shown("x" * 500) == "'" + "x" * 76 + "..."
    assert errors.shown("x" * 78) == "'" + "x" * 78 + "'"
    assert errors.shown("abcdefgh", limit=6) == "'ab..."


def test_callers_find_every_reason_that_comes_by_grpc_in_the_docs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "errors.md").read_text()
    told = set(re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \| (\d+) \|", page, re.MULTILINE))
    never = {"ClusterLost", "EngineStartFailed", "JobFailed", "TooManyQuarantined"}
    known = {(kind.reason, kind.grpc_status, str(kind.http_status)) for kind in TREE if kind.__name__ not in never}
    assert told == known
