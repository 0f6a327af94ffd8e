from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.adapters import AdapterEntry, AdapterTable, adapter_arguments, adapter_id, check_name, rank
from hycluster.errors import InvalidInput, SettingsError
from hycluster.settings.model import Adapter, Model

STATIC = (Adapter(name="a", source="/a"), Adapter(name="b", source="/b"))
words = st.builds(
    AdapterEntry, st.integers(0, 3), st.sampled_from(["x", "y"]), st.none() | st.sampled_from(["/1", "/2"])
)
# Whoever says something says one thing a turn.
tables = st.dictionaries(st.sampled_from(["a", "b"]), words).map(
    lambda said: {name: AdapterEntry(word.turn, word.by, f"/{word.turn}{word.by}") for name, word in said.items()}
)


def folder(path: Path, **config: Any) -> str:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    return str(path)


class TestTable:
    def test_the_settings_adapters_are_there_from_the_start(self) -> None:
        assert AdapterTable(STATIC).sources == {"a": "/a", "b": "/b"}

    def test_load_and_unload(self) -> None:
        table = AdapterTable(STATIC)
        table.say("c", "/c", "ingress")
        table.say("a", None, "ingress")
        assert table.sources == {"b": "/b", "c": "/c"}

    def test_what_one_ingress_process_unloads_another_does_not_bring_back(self) -> None:
        one, other, directory = AdapterTable(STATIC), AdapterTable(STATIC), AdapterTable()
        one.say("a", None, "one")
        for ingress in (one, other, one, other):
            directory.merge(ingress.words)
            ingress.merge(directory.words)
        assert one.sources == other.sources == directory.sources == {"b": "/b"}

    def test_a_new_directory_hears_it_all_again(self) -> None:
        ingress, directory = AdapterTable(STATIC), AdapterTable(STATIC)
        ingress.say("c", "/c", "ingress")
        ingress.say("b", None, "ingress")
        directory.merge(ingress.words)
        assert directory.sources == {"a": "/a", "c": "/c"}

    def test_two_ingress_processes_at_once_agree_in_the_end(self) -> None:
        one, other = AdapterTable(), AdapterTable()
        one.say("c", "/1", "one")
        other.say("c", "/2", "other")
        one.merge(other.words)
        other.merge(one.words)
        assert one.sources == other.sources

    @given(tables, tables, tables)
    def test_the_order_of_hearing_does_not_matter(self, a: Any, b: Any, c: Any) -> None:
        ends = []
        for order in ((a, b, c), (c, b, a), (b, a, c, a)):
            table = AdapterTable()
            for said in order:
                table.merge(said)
            ends.append(table.words)
        assert ends[0] == ends[1] == ends[2]


def test_ids_tell_name_and_source_apart_and_fit_a_signed_64_bit_number() -> None:
    ids = {adapter_id(name, source) for name in ("a", "b", "a\0") for source in ("/a", "/b")}
    assert len(ids) == 6
    assert all(0 < number < 2**63 for number in ids)
    # Ingress processes on other machines, and later versions of an ingress process, must come to the same number.
    assert adapter_id("a", "/a") == 935128311797638144


class TestRank:
    def test_is_the_highest_of_any_module(self, tmp_path: Path) -> None:
        assert rank(folder(tmp_path / "a", r=8)) == 8
        assert rank(folder(tmp_path / "b", r=8, rank_pattern={"q_proj": 24})) == 24

    @pytest.mark.parametrize("config", [{}, {"r": 0}, {"r": "8"}, {"r": 8, "rank_pattern": {"q_proj": None}}])
    def test_must_be_given(self, config: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match="gives no rank"):
            rank(folder(tmp_path / "a", **config))

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match=r"is no LoRA adapter: adapter_config.json: no such file$"):
            rank(str(tmp_path / "nothing"))

    @pytest.mark.parametrize("text", ["no json", "[1]"])
    def test_no_mapping(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(InvalidInput, match=r"is no LoRA adapter: adapter_config.json"):
            rank(str(tmp_path))


class TestArguments:
    def test_none_without_adapters(self) -> None:
        assert adapter_arguments(Model(name="m", source="/m")) == {}

    def test_as_large_as_the_adapters_need(self, tmp_path: Path) -> None:
        sources = [folder(tmp_path / "a", r=4), folder(tmp_path / "b", r=20)]
        adapters = tuple(Adapter(name=f"a{number}", source=source) for number, source in enumerate(sources))
        assert adapter_arguments(Model(name="m", source="/m", adapters=adapters)) == {
            "enable_lora": True,
            "max_lora_rank": 32,
            "max_loras": 2,
            "max_cpu_loras": 10,
        }

    def test_what_cannot_be_read_is_named(self) -> None:
        model = Model(name="m", source="/m", adapters=(Adapter(name="a", source="/nothing"),))
        with pytest.raises(SettingsError, match=r"^models: m: adapters: a: source: '/nothing' is no LoRA adapter"):
            adapter_arguments(model)

    def test_a_rank_that_vllm_does_not_take(self, tmp_path: Path) -> None:
        adapter = Adapter(name="a", source=folder(tmp_path / "a", r=513))
        with pytest.raises(SettingsError, match=r"^models: m: adapters: one has rank 513; vLLM takes at most 512$"):
            adapter_arguments(Model(name="m", source="/m", adapters=(adapter,)))


@pytest.mark.parametrize("name", ["", " ", "-a", "a b", "a" * 201, "a\n"])
def test_names_that_callers_could_not_say(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"^lora_name: .* is not allowed"):
        check_name(name, "/a")


def test_a_source_must_be_given() -> None:
    with pytest.raises(InvalidInput, match=r"^lora_path: must not be empty$"):
        check_name("a", "")
