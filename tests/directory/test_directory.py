from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest

from hycluster.adapters import AdapterEntry
from hycluster.core import BulkDemand, GatewayWork, ReplicaAddress, ReplicaLoad
from hycluster.directory import directory
from hycluster.directory.autoscaling import PoolLoad, Scaling
from hycluster.directory.directory import FORGET_AFTER_S, Demand, Directory, IngressReport, PoolView, ReplicaReport
from hycluster.settings.model import Adapter, Model
from hycluster.traffic import Minute, ModelTraffic

MODEL = Model(name="m", source="/m")


class Clock(SimpleNamespace):
    """In the place of the ``time`` module."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(directory, "time", clock)
    return clock


def report(replica_id: str, *, accepting: bool = True, running: int = 0) -> ReplicaReport:
    address = ReplicaAddress(replica_id, MODEL.name, "tcp://h:1", "tcp://h:2", "token")
    return ReplicaReport(address, ReplicaLoad(running=running), accepting)


def seen(there: Directory) -> list[str]:
    return [r.address.replica_id for r in there.view(MODEL.name).replicas]


def test_what_replicas_say_gateways_hear() -> None:
    there = Directory()
    there.report(MODEL, report("a", running=3))
    there.report(MODEL, report("b", accepting=False))
    view = there.sync(MODEL.name, "g", {})
    assert view.model == MODEL
    a, b = view.replicas
    assert (a.address.replica_id, a.load.running, a.accepting) == ("a", 3, True)
    assert (b.address.replica_id, b.accepting) == ("b", False)
    assert there.models() == {"m": 1}


def test_a_pool_is_reached_when_every_gateway_is_connected_to_a_replica(clock: Clock) -> None:
    there = Directory()
    there.sync(MODEL.name, "early", {})
    assert not there.overview().unreached
    there.report(MODEL, report("a"))
    there.report(MODEL, report("b", accepting=False))
    assert there.overview().unreached == {"m"}, "no gateway has said anything yet"
    there.sync(MODEL.name, "g", {"a": 0})
    assert not there.overview().unreached
    there.sync(MODEL.name, "h", {})
    assert there.overview().unreached == {"m"}
    there.sync(MODEL.name, "h", {"b": 7})
    assert there.overview().unreached == {"m"}, "what takes no requests does not count"
    clock.now += FORGET_AFTER_S - 1
    there.report(MODEL, report("a"))
    there.sync(MODEL.name, "g", {"a": 0})
    clock.now += 2
    assert not there.overview().unreached, "a gateway that is gone is not waited for"


def test_the_last_word_counts() -> None:
    there = Directory()
    there.report(MODEL, report("a", running=3))
    there.report(MODEL, report("a", running=5))
    (only,) = there.view(MODEL.name).replicas
    assert only.load.running == 5


def test_an_unknown_model_has_no_pool() -> None:
    view = Directory().sync("nope", "g", {"a": 1})
    assert view.model is None
    assert view.replicas == []


def test_models_are_kept_apart() -> None:
    there = Directory()
    other = Model(name="other", source="/o")
    there.report(MODEL, report("a"))
    there.report(other, report("b"))
    assert seen(there) == ["a"]
    assert there.models() == {"m": 1, "other": 1}


def test_a_replica_that_is_silent_is_forgotten(clock: Clock) -> None:
    there = Directory()
    there.report(MODEL, report("silent"))
    clock.now += FORGET_AFTER_S / 2
    there.report(MODEL, report("talking"))
    clock.now += FORGET_AFTER_S / 2 - 0.1
    assert seen(there) == ["silent", "talking"]
    clock.now += 0.2
    assert there.models() == {"m": 1}
    assert seen(there) == ["talking"]


def test_a_replica_that_leaves_is_gone_at_once() -> None:
    there = Directory()
    there.report(MODEL, report("a"))
    there.report(MODEL, report("b"))
    there.leave(MODEL.name, "a")
    there.leave(MODEL.name, "never there")
    there.leave("no such model", "a")
    assert seen(there) == ["b"]


def test_outstanding_tokens_by_gateway() -> None:
    there = Directory()
    there.report(MODEL, report("a"))
    there.report(MODEL, report("b"))
    there.sync(MODEL.name, "g1", {"a": 10, "b": 20})
    view = there.sync(MODEL.name, "g2", {"a": 5})
    assert [r.load.outstanding_tokens for r in view.replicas] == [{"g1": 10, "g2": 5}, {"g1": 20, "g2": 0}]
    view = there.sync(MODEL.name, "g1", {})
    assert [r.load.outstanding_tokens for r in view.replicas] == [{"g1": 0, "g2": 5}, {"g1": 0, "g2": 0}]


def test_what_there_is_of_it_by_gateway(clock: Clock) -> None:
    there, work = Directory(), GatewayWork(prefill_tokens=7, requests=2, decoding=1, kv_tokens=30)
    for replica in "ab":
        there.report(MODEL, report(replica))
    there.sync(MODEL.name, "g1", {"a": 10, "b": 0}, work={"a": work})
    view = there.sync(MODEL.name, "g2", {"a": 5, "b": 0})
    assert [each.load.work for each in view.replicas] == [{"g1": work}, {}]
    clock.now += FORGET_AFTER_S + 0.1
    there.report(MODEL, report("a"))
    (only,) = there.sync(MODEL.name, "g2", {}).replicas
    assert only.load.work == {}


def test_what_a_silent_gateway_had_outstanding_is_forgotten(clock: Clock) -> None:
    there = Directory()
    there.report(MODEL, report("a"))
    there.sync(MODEL.name, "gone", {"a": 1000})
    clock.now += FORGET_AFTER_S + 0.1
    there.report(MODEL, report("a"))
    (only,) = there.sync(MODEL.name, "g", {"a": 1}).replicas
    assert only.load.outstanding_tokens == {"g": 1}


def test_what_jobs_want_is_told_to_all_gateways_for_as_long_as_they_say_it(clock: Clock) -> None:
    there = Directory()
    there.report(MODEL, report("a"))
    wants = {"job": BulkDemand(3, more=True)}
    assert there.sync("m", "g", {}, bulk=wants).bulk == {"g": wants}
    assert there.sync("m", "h", {}).bulk == {"g": wants}
    clock.now += FORGET_AFTER_S + 0.1
    assert there.sync("m", "h", {}).bulk == {}


def test_who_looks_sees_what_gateways_hear_and_is_none_of_them(clock: Clock) -> None:
    there = Directory()
    there.scale("m", Scaling(2, 1))
    for name in ("a", "silent"):
        there.report(MODEL, report(name, running=3))
    there.sync("m", "gone", {"a": 1000})
    clock.now += FORGET_AFTER_S - 0.1
    there.report(MODEL, report("a", running=4))
    heard = there.sync("m", "g", {"a": 7}, {"x": AdapterEntry(1, "g", "/x")}, Demand(MODEL, waiting_requests=2))
    before = pickle.dumps(there._pools)
    assert there.view("m") == heard
    assert [r.load.outstanding_tokens for r in heard.replicas] == [{"gone": 1000, "g": 7}, {"gone": 0, "g": 0}]
    clock.now += 0.2
    (only,) = there.view("m").replicas
    assert (only.address.replica_id, only.load.outstanding_tokens) == ("a", {"g": 7})
    assert there.view("nope") == PoolView(None, [])
    assert pickle.dumps(there._pools) == before


class TestAdapters:
    STATIC = Model(name="m", source="/m", adapters=(Adapter(name="a", source="/a"),))

    def test_the_settings_adapters_and_what_ingress_processes_say(self) -> None:
        there = Directory()
        there.report(self.STATIC, report("r"))
        there.sync("m", "g", {}, {"b": AdapterEntry(1, "g", "/b")})
        assert {name: word.source for name, word in there.sync("m", "h", {}).adapters.items()} == {"a": "/a", "b": "/b"}
        assert there.models() == {"m": 1, "a": 1, "b": 1}
        assert [there.find(name) for name in ("m", "a", "b", "c")] == [self.STATIC] * 3 + [None]

    def test_a_report_does_not_bring_back_what_was_unloaded(self) -> None:
        there = Directory()
        there.report(self.STATIC, report("r"))
        there.sync("m", "g", {}, {"a": AdapterEntry(1, "g", None)})
        there.report(self.STATIC, report("r"))
        assert there.models() == {"m": 1}
        assert there.find("a") is None


def test_the_ranks_of_a_group_are_one_replica() -> None:
    there = Directory()
    for rank in ("a0", "a1"):
        there.report(MODEL, replace(report(rank), group="a"))
    there.report(MODEL, report("b"))
    assert there.models() == {"m": 2}
    assert sorted(seen(there)) == ["a0", "a1", "b"]
    there.report(MODEL, replace(report("a0", accepting=False), group="a"))
    there.report(MODEL, replace(report("a1", accepting=False), group="a"))
    assert there.models() == {"m": 1}


class TestPoolsThatFollowTheirLoad:
    STATIC = Model(name="m", source="/m", adapters=(Adapter(name="a", source="/a"),))

    def test_what_gateways_want_the_scaler_hears(self) -> None:
        there = Directory()
        there.report(MODEL, report("r", running=3))
        there.sync("m", "g", {}, {}, Demand(MODEL, waiting_requests=2, outstanding_tokens=100))
        there.sync("m", "h", {}, {}, Demand(MODEL, waiting_requests=1, outstanding_tokens=10, cold_start_s=7.0))
        # Of a pool whose size is fixed.
        there.sync("m", "wants nothing", {}, {})
        assert there.scale("m", Scaling(1, 1)) == PoolLoad(2, 3, 110, (ReplicaLoad(running=3),), 7.0)

    def test_what_the_scaler_says_gateways_hear(self, clock: Clock) -> None:
        there = Directory()
        assert there.scale("m", Scaling(2, 1, 3.0)) == PoolLoad()
        assert there.sync("m", "g", {}).scaling == there.view("m").scaling == Scaling(2, 1, 3.0)
        clock.now += FORGET_AFTER_S + 0.1
        assert there.sync("m", "g", {}).scaling is there.view("m").scaling is None

    def test_who_is_silent_wants_nothing_and_does_nothing(self, clock: Clock) -> None:
        there = Directory()
        there.report(MODEL, report("r", running=3))
        there.sync("m", "gone", {}, {}, Demand(MODEL, waiting_requests=1))
        clock.now += FORGET_AFTER_S + 0.1
        assert there.scale("m", Scaling(1, 1)) == PoolLoad()

    def test_a_pool_without_a_replica_is_known_by_its_gateways(self) -> None:
        there = Directory()
        there.sync("m", "g", {}, {}, Demand(self.STATIC))
        assert [there.find(name) for name in ("m", "a", "b")] == [self.STATIC, self.STATIC, None]
        assert there.models() == {"m": 0, "a": 0}

    def test_replicas_know_their_settings_better(self) -> None:
        there = Directory()
        there.report(MODEL, report("r"))
        there.sync("m", "old", {}, {}, Demand(self.STATIC))
        assert there.find("m") == MODEL


def test_ingress_processes_are_found_while_they_say_so(clock: Clock) -> None:
    there = Directory()
    one, other = IngressReport("a", "10.0.0.1:9000", True), IngressReport("b", "127.0.0.1:9000", False)
    for report in (one, other, one):
        there.open_ingress(report)
    assert there.ingresses() == [one, other]
    clock.now += FORGET_AFTER_S / 2
    there.open_ingress(one)
    clock.now += FORGET_AFTER_S * 0.6
    assert there.ingresses() == [one]


def test_all_that_is_known_for_whoever_looks(clock: Clock) -> None:
    there = Directory()
    there.begin_start(MODEL, "actor")
    there.start_stage("m", "actor", "weights")
    there.report(MODEL, report("a", running=3))
    there.open_ingress(IngressReport("n", "10.0.0.1:9000", True))
    one, two = (ModelTraffic({1: Minute(answered=number)}) for number in (1, 2))
    there.tell_traffic("i", {"m": one})
    there.tell_traffic("j", {"m": two, "other": one})
    survey = pickle.loads(pickle.dumps(there.survey()))
    assert survey.overview.ready == {"m": 1}
    assert [each.replica for each in survey.overview.starting["m"]] == ["actor"]
    assert survey.pools == {"m": there.view("m")}
    assert survey.ingresses == there.ingresses()
    assert survey.traffic == {"m": [one, two], "other": [one]}
    there.start_ended("m", "actor")
    assert not there.survey().overview.starting
    # An ingress process that has ended was asked all the same, within the hour.
    clock.now += 3500
    there.tell_traffic("j", {"m": two})
    assert there.survey().traffic == {"m": [one, two]}
    clock.now += 200
    there.tell_traffic("j", {"m": two})
    assert there.survey().traffic == {"m": [two]}


def test_faults_are_kept(clock: Clock) -> None:
    there = Directory()
    there.begin_start(MODEL, "x")
    there.start_failed(MODEL, "x", "EngineStartFailed", "no memory")
    for replica in ("a", "b", "c", "d", "e"):
        there.report(MODEL, report(replica))
    there.leave("m", "b")
    closed = "its connection closed"
    there.sync("m", "g", {}, losses={"c": closed, "d": closed, "unknown": closed})
    # A connection that broke, to one that lives; the last that is seen of it is its silence.
    there.report(MODEL, report("d"))
    clock.now += 1
    there.sync("m", "h", {}, losses={"c": "its engine ended", "e": "its engine ended"})
    there.leave("m", "e")
    clock.now += FORGET_AFTER_S + 1
    there.sync("m", "g", {})
    there.sync("m", "g", {})
    faults = there.survey().faults
    assert [(fault.replica, fault.what) for fault in sorted(faults, key=lambda fault: fault.replica)] == [
        # One that left in good order is none.
        ("a", "lost: has said nothing for 10 s"),
        ("c", "lost: its connection closed"),
        ("d", "lost: has said nothing for 10 s"),
        ("x", "did not start: no memory"),
    ]
    for number in range(100):
        there.start_failed(MODEL, f"x{number}", "EngineStartFailed", "no memory")
    assert len(there.survey().faults) == 50
