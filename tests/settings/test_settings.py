from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hycluster.core import Sampling
from hycluster.errors import SettingsError
from hycluster.settings.base import Strict, home
from hycluster.settings.ingress import Batches
from hycluster.settings.read import DEFAULT_SETTINGS, load_settings, load_yaml, override, validate
from hycluster.settings.settings import Settings
from hycluster.settings.texts import takes_text

ROOT = Path(__file__).parents[2]
MODEL = {"name": "m", "source": "models/m"}


class Job(Strict):
    name: str
    sampling: Sampling = Sampling()


def refusal(kind: type[Any], data: dict[str, Any]) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        validate(kind, data, "job.yaml")
    return str(refused.value).splitlines()


def model_with(**changes: Any) -> dict[str, Any]:
    return {"models": [MODEL | changes]}


@pytest.mark.parametrize("path", sorted((ROOT / "deployments").glob("*.yaml")), ids=lambda path: path.name)
def test_every_deployment_loads(path: Path) -> None:
    assert load_settings(path).models


def test_the_default_settings_are_there() -> None:
    assert load_settings(ROOT / DEFAULT_SETTINGS).http.port == 8000


def test_a_model_needs_only_a_name_and_a_source() -> None:
    (model,) = validate(Settings, {"models": [MODEL]}, "x").models
    assert model.replicas.count == 1
    assert model.parallel.devices == 1
    assert model.simulated is None


def test_model_by_name() -> None:
    settings = validate(Settings, {"models": [MODEL, MODEL | {"name": "n"}]}, "x")
    assert settings.model("n").name == "n"
    with pytest.raises(SettingsError, match=r"model: 'o' is not in the settings; there are \['m', 'n'\]"):
        settings.model("o")


def test_devices_of_a_replica() -> None:
    settings = validate(Settings, model_with(parallel={"tensor": 8, "pipeline": 2, "data": 3}), "x")
    parallel = settings.models[0].parallel
    assert (parallel.devices, parallel.devices_per_rank, parallel.expert_ranks) == (48, 16, 24)


@pytest.mark.parametrize(
    ("replicas", "count", "most", "vary", "sleeps"),
    [
        ({}, 1, 1, False, False),
        ({"min": 2, "max": 2}, 2, 2, False, False),
        ({"min": 1, "max": 4}, 1, 4, True, False),
        ({"min": 1, "max": 4, "initial": 3}, 3, 4, True, False),
        ({"min": 0, "max": 1}, 0, 1, True, True),
        ({"min": 0, "max": 4, "initial": 1}, 1, 4, True, True),
    ],
)
def test_how_many_replicas(replicas: dict[str, int], count: int, most: int, vary: bool, sleeps: bool) -> None:
    (model,) = validate(Settings, model_with(replicas=replicas), "x").models
    assert (model.replicas.count, model.replicas.most, model.replicas.vary) == (count, most, vary)
    assert model.sleeps == sleeps
    assert model.engines == most


def test_every_data_parallel_rank_is_an_engine() -> None:
    settings = validate(Settings, model_with(parallel={"tensor": 8, "data": 3}, replicas={"min": 2}), "x")
    assert settings.models[0].engines == 6


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ({"models": []}, ["models: [] is not allowed: Tuple should have at least 1 item after validation, not 0"]),
        ({}, ["models: is missing"]),
        ({"models": [{"name": "m"}]}, ["models.0.source: is missing"]),
        (
            model_with(replicas={"min": 0}),
            ["models.0.replicas.min: 0 is not allowed without max; set max to the most replicas that there may be"],
        ),
        (model_with(replicas={"min": 3, "max": 2}), ["models.0.replicas.max: 2 is below min (3)"]),
        (
            model_with(replicas={"min": 1, "initial": 2}),
            ["models.0.replicas.initial: 2 is not between min (1) and max (1)"],
        ),
        (
            model_with(replicas={"min": 1, "max": 3, "initial": 0}),
            ["models.0.replicas.initial: 0 is not between min (1) and max (3)"],
        ),
        (
            model_with(autoscaling={"scale_down_after_s": 5, "cold_start": "refuse"}, replicas={"min": 2}),
            ["models.0: autoscaling.cold_start: is without effect; set replicas.max above replicas.min (2)"],
        ),
        (
            model_with(autoscaling={"cold_start": "hope"}, replicas={"min": 0, "max": 1}),
            ["models.0.autoscaling.cold_start: 'hope' is not allowed: Input should be 'wait' or 'refuse'"],
        ),
        (
            model_with(autoscaling={"target_kv_usage": 80}, replicas={"min": 0, "max": 1}),
            ["models.0.autoscaling.target_kv_usage: 80 is not allowed: Input should be less than or equal to 1"],
        ),
        (
            model_with(simulated={"kv_blocks": 3, "block_size_tokens": 4, "max_model_len": 13}),
            ["models.0.simulated.kv_blocks: 3 hold 12 tokens, fewer than max_model_len (13)"],
        ),
        (
            model_with(parallel={"data": 2, "eplb": {"enabled": True}}),
            ["models.0.parallel: eplb.enabled: true is not allowed; needs expert: true"],
        ),
        (
            model_with(parallel={"expert": True, "eplb": {"enabled": True}}),
            ["models.0.parallel: eplb.enabled: true is not allowed; needs more ranks than one (tensor, data)"],
        ),
        (
            model_with(parallel={"eplb": {"redundant_experts": 2}}),
            ["models.0.parallel.eplb.redundant_experts: 2 is without effect; set enabled to true"],
        ),
        ({"models": [MODEL, MODEL]}, ["models: the name 'm' is given 2 times; names must differ"]),
        (
            {"models": [MODEL, 3]},
            ["models.1: 3 is not allowed: Input should be a valid dictionary or instance of Model"],
        ),
        (
            {"models": [MODEL], "data_plane": {"port_min": 5, "port_max": 4}},
            ["data_plane.port_max: 4 is below port_min (5)"],
        ),
        (
            {"models": [MODEL], "http": {"port": 65536}},
            ["http.port: 65536 is not allowed: Input should be less than or equal to 65535"],
        ),
        ({"models": [MODEL], 1: 2}, ["1: 1 is not allowed: Keys should be strings"]),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(data: dict[str, Any], lines: list[str]) -> None:
    assert refusal(Settings, data) == [f"job.yaml: {line}" for line in lines]


def test_each_wrong_field_has_its_line() -> None:
    lines = refusal(
        Settings, {"models": [MODEL], "http": {"port": -1}, "grpc": {"port": "x"}, "ingress": {"replicas": 0}}
    )
    assert [line.split(": ")[1] for line in lines] == ["http.port", "grpc.port", "ingress.replicas"]


@pytest.mark.parametrize(
    ("data", "field", "meant"),
    [
        ({"models": [MODEL], "modelz": 1}, "modelz", "models"),
        ({"models": [MODEL], "http": {"prot": 1}}, "http.prot", "port"),
        (model_with(replicaz={}), "models.0.replicaz", "replicas"),
        (model_with(autoscaling={"scale_down_s": 3}), "models.0.autoscaling.scale_down_s", "scale_down_after_s"),
        (model_with(simulated={"kv_block": 3}), "models.0.simulated.kv_block", "kv_blocks"),
    ],
)
def test_unknown_keys_get_a_suggestion(data: dict[str, Any], field: str, meant: str) -> None:
    (line,) = refusal(Settings, data)
    assert line.startswith(f"job.yaml: {field}: unknown key; did you mean '{meant}'? (allowed: ")
    assert meant in line.partition("allowed: ")[2]


def test_an_unknown_key_like_no_other() -> None:
    (line,) = refusal(Settings, {"models": [MODEL], "router": {"zzz": 1}})
    allowed = "failover, failover_wait_s, follow_kv_blocks, policy, session_slack_tokens"
    assert line == f"job.yaml: router.zzz: unknown key (allowed: {allowed})"


def test_a_key_of_another_section_is_found_there() -> None:
    (line,) = refusal(Settings, {"models": [MODEL], "kv_cache_gib": 1})
    assert line.startswith("job.yaml: kv_cache_gib: unknown key; did you mean 'models[].hardware.kv_cache_gib'? ")


def test_sampling_in_settings() -> None:
    job = validate(Job, {"name": "j", "sampling": {"max_tokens": 3, "stop": ["a"]}}, "job.yaml")
    assert job.sampling == Sampling(max_tokens=3, stop=("a",))


def test_an_unknown_key_of_sampling_gets_a_suggestion() -> None:
    (line,) = refusal(Job, {"name": "j", "sampling": {"max_tokenz": 3}})
    assert line.startswith("job.yaml: sampling.max_tokenz: unknown key; did you mean 'max_tokens'? (allowed: frequency")


def test_a_wrong_value_of_sampling_names_its_field_once() -> None:
    assert refusal(Job, {"name": "j", "sampling": {"max_tokens": 0}}) == [
        "job.yaml: sampling.max_tokens: 0 is not allowed; must be at least 1"
    ]


def test_long_values_are_cut() -> None:
    for data in ({"name": ["x" * 10_000]}, {"name": "j", "sampling": {"n": "x" * 10_000}}):
        (line,) = refusal(Job, data)
        assert len(line) < 250


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"- a\n", "must be a mapping of settings, not list"),
        (b"a: [\n", "is not YAML"),
        (b"\xff\xfe\xfa", "is not text in UTF-8"),
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as refused:
        load_yaml(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: {said}")
    assert "\n" not in message


def test_a_key_that_is_given_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("a:\n  replicas: 2\n  b: 1\n  replicas: 3\n")
    with pytest.raises(SettingsError) as refused:
        load_yaml(path)
    assert str(refused.value) == f"{path}: the key 'replicas' is given twice, in lines 2 and 4"
    path.write_text("a: {b: 1, b: 1}\n")
    with pytest.raises(SettingsError, match="'b' is given twice, in lines 1 and 1"):
        load_yaml(path)
    path.write_text("a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}\n")
    assert load_yaml(path)["d"] == {"b": 3, "c": 2}


@pytest.mark.parametrize("store", ["s3:/x", "S3://b/x", "s3://", "s3:///x", "s3:b", "gs://b", "s4://b", "file:///x"])
def test_a_store_that_only_looks_like_an_address_is_refused(store: str) -> None:
    with pytest.raises(SettingsError) as refused:
        validate(Batches, {"store": store}, "s.yaml")
    assert str(refused.value).startswith(f"s.yaml: store: {store!r} is not allowed; must be s3://BUCKET")


def test_a_stores_secret_is_not_repeated() -> None:
    with pytest.raises(SettingsError) as refused:
        validate(Batches, {"store": "S3://KEY:SECRET@b"}, "s.yaml")
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize("store", ["s3://b", "s3://k:s@b/a/?endpoint_override=localhost:1&scheme=http", "/a", "a/b"])
def test_stores(store: str) -> None:
    assert validate(Batches, {"store": store}, "s.yaml").store == store


def test_a_drain_is_no_longer_than_a_day() -> None:
    data = {"models": [{"name": "m", "source": "org/m"}], "drain_timeout_s": 86_401}
    with pytest.raises(SettingsError, match="drain_timeout_s: 86401 is not allowed"):
        validate(Settings, data, "s.yaml")


def test_node_selectors_are_labels_as_kubernetes_has_them() -> None:
    hardware = {"node_selector": {"nvidia.com/gpu.product": "NVIDIA H20"}}
    with pytest.raises(SettingsError, match="'NVIDIA H20' is not allowed"):
        validate(Settings, {"models": [{"name": "m", "source": "org/m", "hardware": hardware}]}, "s.yaml")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml: no such file"):
        load_settings(tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match="can't be read: Is a directory"):
        load_settings(tmp_path)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("a=1", {"a": 1, "b": {"c": [{"d": 0}]}}),
        ("b.c.0.d=true", {"b": {"c": [{"d": True}]}}),
        ("b.c.0=x=y", {"b": {"c": ["x=y"]}}),
        ("b.c=[1, 2]", {"b": {"c": [1, 2]}}),
        ("e.f.g=", {"b": {"c": [{"d": 0}]}, "e": {"f": {"g": None}}}),
        ("b={broken", {"b": "{broken"}),
    ],
)
def test_override(assignment: str, expected: dict[str, Any]) -> None:
    data = {"b": {"c": [{"d": 0}]}}
    assert override(data, [assignment]) == expected
    assert data == {"b": {"c": [{"d": 0}]}}


@pytest.mark.parametrize("assignment", ["a", "=1", ""])
def test_override_needs_a_key_and_a_value(assignment: str) -> None:
    with pytest.raises(SettingsError, match=r"--set: '.*' must be of the form KEY=VALUE"):
        override({}, [assignment])


@pytest.mark.parametrize("assignment", ["a.b=1", "l.1=2", "l.x=2", "l.0.y=2", "l.1.y=2", "none.x=1", "s.x.y=1"])
def test_override_of_a_place_that_is_not_there(assignment: str) -> None:
    with pytest.raises(SettingsError, match=r"--set: '.*' names no place in the settings"):
        override({"a": 1, "l": [1], "none": None, "s": "text"}, [assignment])


@pytest.mark.parametrize("text", ["C # program", "a\nb", "{x}", "Q: {x}", "1.0", "yes", "[1", "", "😀", " x ", '"q"'])
def test_texts_are_taken_as_they_stand(text: str) -> None:
    assignments = [f"models.0.name={text}", f"http.host={text}", f"models.0.hardware.node_selector.zone={text}"]
    data = override({"models": [{}]}, [*assignments, "data_plane.host=null", "http.port=1"], Settings)
    assert data["models"] == [{"name": text, "hardware": {"node_selector": {"zone": text}}}]
    assert data["http"] == {"host": text, "port": 1}
    assert data["data_plane"] == {"host": None}


@pytest.mark.parametrize(
    ("key", "is_text"),
    [
        ("models.0.source", True),
        ("models.0.adapters.1.name", True),
        ("router.policy", True),
        ("data_plane.host", True),
        ("models.0.engine.dtype", False),
        ("models.0.replicas.min", False),
        ("models.0", False),
        ("models.0.adapters", False),
        ("no.such.key", False),
    ],
)
def test_which_settings_are_texts(key: str, is_text: bool) -> None:
    assert takes_text(Settings, key.split(".")) == is_text


@given(
    st.lists(st.text("abc", min_size=1, max_size=2), min_size=1, max_size=4),
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="ascii")) | st.lists(st.integers()),
)
def test_override_sets_what_it_says(path: list[str], value: Any) -> None:
    result: Any = override({}, [f"{'.'.join(path)}={yaml.safe_dump(value)}"])
    for part in path:
        result = result[part]
    assert result == value


def test_overrides_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"models": [MODEL]}))
    settings = load_settings(path, ["http.port=0", "models.0.replicas.min=2", "http.port=81"])
    assert (settings.http.port, settings.models[0].replicas.min) == (81, 2)
    with pytest.raises(SettingsError, match=r"s\.yaml: http\.prot: unknown key; did you mean 'port'\?"):
        load_settings(path, ["http.prot=1"])


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("HYCLUSTER_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".cache" / "hycluster"


class TestAdapters:
    ADAPTERS: ClassVar[list[dict[str, str]]] = [{"name": "a", "source": "/a"}]

    def test_an_adapter_stands_for_its_model(self) -> None:
        settings = Settings.model_validate({"models": [{"name": "n", "source": "s", "adapters": self.ADAPTERS}]})
        assert settings.model("a") == settings.model("n")

    @pytest.mark.parametrize("other", ["n", "a"])
    def test_names_differ_across_models_and_adapters(self, other: str) -> None:
        models = [
            {"name": "n", "source": "s", "adapters": self.ADAPTERS},
            {"name": "o", "source": "s", "adapters": [{"name": other, "source": "/b"}]},
        ]
        with pytest.raises(SettingsError, match=f"the name {other!r} is given 2 times"):
            validate(Settings, {"models": models}, "settings")

    def test_a_simulated_engine_has_none(self) -> None:
        model = {"name": "n", "source": "s", "adapters": self.ADAPTERS, "simulated": {}}
        with pytest.raises(SettingsError, match="'a' is not allowed; a simulated engine has no adapters"):
            validate(Settings, {"models": [model]}, "settings")
