from __future__ import annotations

import http
import inspect

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
        "PromptTooLong": (400, "INVALID_ARGUMENT", 2),
        "ReplicaLost": (503, "UNAVAILABLE", 1),
        "KillsReplicas": (422, "FAILED_PRECONDITION", 1),
        "RequestFailed": (503, "UNAVAILABLE", 1),
        "SettingsError": (400, "INVALID_ARGUMENT", 2),
        "Unauthenticated": (401, "UNAUTHENTICATED", 2),
        "UnknownModel": (404, "NOT_FOUND", 2),
        "NotFound": (404, "NOT_FOUND", 1),
        "Overloaded": (429, "RESOURCE_EXHAUSTED", 1),
        "Unavailable": (503, "UNAVAILABLE", 1),
        "DeadlineExceeded": (504, "DEADLINE_EXCEEDED", 1),
        "EngineStartFailed": (500, "INTERNAL", 1),
        "ClusterLost": (500, "INTERNAL", 4),
        "JobFailed": (500, "INTERNAL", 1),
        "TooManyQuarantined": (500, "INTERNAL", 3),
    }


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
