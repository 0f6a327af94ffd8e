from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from hycluster.directory.autoscaling import Scaling
from hycluster.directory.directory import Overview, PoolView, Survey
from hycluster.directory.starts import StageTime, StartingReplica
from hycluster.pool_health import PoolHealth, StartTrouble
from hycluster.settings.model import Model
from hycluster.settings.objectives import Objectives
from hycluster.settings.pool import Replicas
from hycluster.state.cluster_state import cluster_state, health_of
from hycluster.state.terminal import shown_state
from hycluster.state.traffic_state import BatchTraffic
from tests.state.made import BIG, NOW, SECRET, SMALL, made_pools, made_state, made_survey

MODEL = Model(name="m", source="x", engine={"hf_token": "a-token"})


def test_what_is_told() -> None:
    told = json.loads(json.dumps(made_state().told()))
    assert (told["state"], told["version"]) == ("degraded", "0.1.0")
    assert told["problems"] == [
        f"{BIG}: 2 of 4 replicas serve; 2 starts of replicas failed: CUDA out of memory: 80 GiB asked, 12 GiB free"
    ]
    big, small = told["pools"]
    assert (big["model"], big["state"], big["replicas_ready"], big["replicas_wanted"]) == (BIG, "degraded", 2, 4)
    assert (small["model"], small["state"], small["why"]) == (SMALL, "ready", "")
    first = next(one for one in big["replicas"] if one["id"] == "a1b2c3d4e5f60718")
    assert first == {
        "id": "a1b2c3d4e5f60718",
        "host": "10.0.0.71",
        "group": None,
        "draining": False,
        "lost": False,
        "running": 41,
        "waiting": 0,
        "most_running": 64,
        "kv_usage": 0.62,
        "outstanding_tokens": 28741,
        "step_s": 0.0312,
        "prefix_hit_rate": 0.64,
        "batch_rows": 8,
        "batch_rows_parked": 2,
    }
    assert big["starting"] == [
        {
            "replica": "77aa88bb99cc",
            "stages": [{"name": "weights", "duration_s": 41.2}, {"name": "engine", "duration_s": 12.6}],
        }
    ]
    assert [(job["job"], job["rows"], job["more"]) for job in big["jobs"]] == [
        ("batch_9", 3, False),
        ("summaries-s3://corpus/out", 24, True),
    ]
    assert [batch["status"] for batch in told["batches"]] == ["in_progress", "in_progress", "failed", "completed"]
    assert told["faults"][0]["what"].startswith("did not start")


def test_no_secret_is_told() -> None:
    survey = made_survey()
    survey.pools[SMALL] = replace(survey.pools[SMALL], model=MODEL.model_copy(update={"name": SMALL}))
    told = json.dumps(cluster_state(survey, made_pools(), version="1", now=NOW).told())
    assert SECRET not in told
    assert "a-token" not in told


def test_traffic_is_the_sum_of_all_ingress_processes_and_models() -> None:
    state = made_state()
    assert state.traffic.answered == sum(each.answered for each in state.traffic_by_model.values()) > 3000
    assert (state.traffic.failed, state.traffic.unavailable, state.traffic.shed) == (18, 18, 36)
    # As the alerts have it: who was shed, or left, does not count against the objective.
    owed = state.traffic.answered + 36
    assert state.traffic.answered_share == pytest.approx(state.traffic.answered / owed)
    assert state.traffic.burn_rate == pytest.approx(36 / owed / 0.005, rel=0.01)
    assert state.traffic.asked == owed + 36 + state.traffic.cancelled == owed + 39
    assert len(state.traffic.minutes) == 60
    assert [minute.failed for minute in state.traffic.minutes if minute.failed] == [9, 9]
    assert state.traffic.minutes[-1].at == NOW
    # Rows of batch work wait for 90 s, and are in nothing but their own figures.
    assert state.traffic.ttft_s.p99 is not None
    assert state.traffic.ttft_s.p99 < 2
    assert state.traffic.batch == BatchTraffic(600, 0, 30, 0, 0, 60_000)
    assert [minute.batch_output_tokens for minute in state.traffic.minutes[-6:]] == [0, *[12_000] * 5]


def test_the_settings_say_what_is_promised() -> None:
    survey, promised = made_survey(), Objectives(answered_ratio=0.9)
    traffic = cluster_state(survey, made_pools(), version="1", objectives=promised, now=NOW).traffic
    assert traffic.objective == 0.9
    assert traffic.answered_share is not None
    assert traffic.burn_rate == pytest.approx((1 - traffic.answered_share) / 0.1, abs=0.01)


def test_nobody_asked() -> None:
    traffic = cluster_state(Survey(), {}, version="1", now=NOW).traffic
    assert (traffic.answered_share, traffic.burn_rate, traffic.ttft_s.p50, traffic.cached_share) == (None,) * 4


def pool(
    ready: int, wanted: int, *, starting: bool = False, asleep: bool = False, known: int | None = None, **health: object
) -> tuple[str, str, str]:
    """State of the cluster and of its only pool, and why; the directory knows of so many replicas."""
    overview = Overview(
        1,
        {"m": ready if known is None else known},
        asleep=frozenset({"m"} if asleep else ()),
        starting={"m": (StartingReplica("x", (StageTime("weights", 1.0),)),)} if starting else {},
    )
    survey = Survey(overview, {"m": PoolView(MODEL, [])})
    state = cluster_state(survey, {"m": PoolHealth(ready, wanted, **health)}, version="1")  # type: ignore[arg-type]
    return state.state, state.pools[0].state, state.pools[0].why


TROUBLE = StartTrouble(1, "SettingsError", "no weights", 3.0)


def test_states_of_a_pool() -> None:
    assert pool(2, 2) == ("ready", "ready", "")
    assert pool(0, 0, asleep=True, wakes=True) == ("ready", "asleep", "sleeps; a request wakes it")
    assert pool(1, 2, starting=True) == ("degraded", "degraded", "1 of 2 replicas serve; 1 starting (weights)")
    assert pool(0, 1, starting=True) == ("unavailable", "starting", "0 of 1 replicas serve; 1 starting (weights)")
    assert pool(0, 1, starting=True, trouble=TROUBLE) == (
        "unavailable",
        "unavailable",
        "0 of 1 replicas serve; a replica did not start: no weights",
    )
    # The ingress process sees at once that a replica is gone, the directory some seconds later.
    assert pool(1, 2, known=2) == ("degraded", "degraded", "1 of 2 replicas serve; 1 lost just now")
    assert pool(0, 1, known=1) == ("unavailable", "unavailable", "0 of 1 replicas serve; 1 lost just now")
    # A successor's start fails, and nothing is missing yet.
    assert pool(1, 1, trouble=TROUBLE)[:2] == ("degraded", "degraded")
    assert pool(0, 1)[1] == "unavailable"
    assert pool(0, 1)[2].startswith("0 of 1 replicas serve; the others have not begun to start: their processes wait")
    assert pool(1, 1, cut_off=True) == (
        "unavailable",
        "unavailable",
        "1 of 1 replicas serve; this ingress process reaches none of them",
    )


def test_a_replica_that_is_lost_is_said_to_be() -> None:
    pools = made_pools()
    pools[BIG] = replace(pools[BIG], lost=frozenset({"a1b2c3d4e5f60718"}))
    state = cluster_state(made_survey(), pools, version="1", now=NOW)
    lost = [each.id for pool in state.pools for each in pool.replicas if each.lost]
    assert lost == ["a1b2c3d4e5f60718"]
    file = io.StringIO()
    Console(file=file, width=160).print(shown_state(state))
    (line,) = (line for line in file.getvalue().splitlines() if "a1b2c3d4" in line)
    assert "lost" in line
    assert "serves" not in line


def test_it_starts_until_an_ingress_process_is_open() -> None:
    assert cluster_state(made_survey(), made_pools(), version="1", open_here=False).state == "starting"


def test_the_directory_alone() -> None:
    survey = made_survey()
    model = Model(name="z", source="x", replicas=Replicas(min=0, max=3))
    survey.pools["z"] = PoolView(model, [], scaling=Scaling(2, 0, decisions={"wake": 1}))
    health = health_of(survey)
    assert health["z"] == PoolHealth(0, 2, True, None)
    assert health[BIG].trouble is not None
    state = cluster_state(survey, health, version="1")
    assert state.pools[2].scaling == {"wake": 1}
