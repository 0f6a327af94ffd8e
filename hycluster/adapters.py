"""LoRA adapters: which ones a model has, said alike at every ingress process.

The settings name some; others are loaded and unloaded through an ingress process while the cluster runs. Each ingress
process keeps the whole table and shows it to the directory twice a second, the directory merges what it is shown, and
every ingress process takes over the result. Of two words on one name the later one holds; an unloaded name is kept as a
word too, or the ingress process that has not heard yet would bring it back. The directory may be lost, and so may any
ingress process, as long as one is left.

One that belongs to a project goes by ``NAME@TENANT/PROJECT`` wherever all are told apart: in the table, in engines, in
metrics. Its callers call it ``NAME``, and for all others there is none of that name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hycluster.auth.caller import current_caller
from hycluster.auth.names import NAME
from hycluster.errors import InvalidInput, SettingsError, shown
from hycluster.settings.base import NAME_PATTERN
from hycluster.settings.model import Adapter, Model

# What vLLM 0.32.0 takes for ``max_lora_rank``.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Adapters of one batch take memory next to the weights, whether they are in use or not.
MAX_IN_BATCH = 8
# Room in host memory for adapters that are loaded at run time.
SPARE = 8
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
# Stands between an adapter's name and its owner; no name has it.
_OF = "@"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class AdapterEntry:
    """The last that was said of a name.

    Attributes:
        turn: counts what was said of this name; the settings' own word is 0.
        by: who said it; settles what two ingress processes said at once.
        source: a folder or a hub id; None when the adapter was unloaded.
    """

    turn: int
    by: str
    source: str | None


class AdapterTable:
    """One model's adapters, as far as its holder has heard."""

    def __init__(self, adapters: Iterable[Adapter] = ()) -> None:
        self._words = {adapter.name: AdapterEntry(0, "", adapter.source) for adapter in adapters}

    @property
    def words(self) -> dict[str, AdapterEntry]:
        """All that is known, to be merged elsewhere."""
        return dict(self._words)

    @property
    def sources(self) -> dict[str, str]:
        """The adapters that requests may name, and where they are."""
        return {name: word.source for name, word in self._words.items() if word.source is not None}

    def merge(self, words: dict[str, AdapterEntry]) -> None:
        """Take over what another holder has heard later."""
        for name, word in words.items():
            mine = self._words.get(name)
            # Nobody says two things in one turn, so the source never decides.
            if mine is None or (mine.turn, mine.by) < (word.turn, word.by):
                self._words[name] = word

    def say(self, name: str, source: str | None, by: str) -> None:
        """Load (a source) or unload (None) an adapter."""
        mine = self._words.get(name)
        self._words[name] = AdapterEntry(mine.turn + 1 if mine else 1, by, source)


def adapter_id(name: str, source: str) -> int:
    """The number by which engines tell adapters apart: the same at all ingress processes, without asking one
    another."""
    digest = hashlib.blake2b(f"{name}\0{source}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1 or 1


def name_in_full(name: str, owner: str) -> str:
    """What a project's adapter goes by where all are told apart.

    Args:
        owner: ``TENANT/PROJECT``.
    """
    return f"{name}{_OF}{owner}"


def public_name(name: str) -> str:
    """What callers call an adapter, or a model."""
    return name.partition(_OF)[0]


def adapter_owner(name: str) -> str | None:
    """Whose an adapter is; None: it is there for all."""
    return name.partition(_OF)[2] or None


def named_by_caller(names: Iterable[str]) -> list[str]:
    """Those of which the caller may know, as he calls them, each once. Where nobody is asked: all, in full."""
    caller = current_caller.get()
    if caller is None:
        return list(names)
    return list(dict.fromkeys(public_name(name) for name in names if adapter_owner(name) in (None, caller.owner)))


class CallersAdapters(Mapping[str, T]):
    """What is known of adapters, by the names by which the caller calls them. Changes with what it is made of.

    Args:
        adapters: by what they go by where all are told apart.
    """

    def __init__(self, adapters: Mapping[str, T]) -> None:
        self._adapters = adapters

    def __getitem__(self, name: str) -> T:
        caller = current_caller.get()
        if caller is None:
            return self._adapters[name]
        if _OF in name:
            raise KeyError(name)
        # One's own goes before one of that name for all.
        own = self._adapters.get(name_in_full(name, caller.owner))
        return own if own is not None else self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(named_by_caller(list(self._adapters)))

    def __len__(self) -> int:
        return len(named_by_caller(self._adapters))


def check_name(name: str, source: str) -> None:
    """Refuse what the settings would refuse. The name may be a project's adapter's in full.

    Raises:
        InvalidInput: names the field and what is allowed.
    """
    called, _, owner = name.partition(_OF)
    of_project = all(map(NAME.fullmatch, owner.split("/"))) and owner.count("/") == 1
    if not re.fullmatch(NAME_PATTERN, called) or len(called) > 200 or not (of_project or called == name):
        raise InvalidInput(f"lora_name: {shown(name)} is not allowed; must be of the form {NAME_PATTERN}")
    if not source:
        raise InvalidInput("lora_path: must not be empty")


def rank(source: str) -> int:
    """An adapter's rank, read from its ``adapter_config.json``.

    Args:
        source: a folder in PEFT's format, or a hub id.

    Raises:
        InvalidInput: there is no such file, or it gives no rank.
    """
    config = _config(source)
    # PEFT lets single modules have a rank of their own.
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(value, int) and value > 0 for value in ranks):
        raise InvalidInput(f"{shown(source)}: adapter_config.json gives no rank (r: {shown(config.get('r'))})")
    return int(max(ranks))


def _config(source: str) -> dict[str, Any]:
    path = Path(source).expanduser() / "adapter_config.json"
    if (
        not path.exists()
        and not Path(source).expanduser().is_dir()
        and source.count("/") == 1
        and source[0] not in "/.~"
    ):
        path = _from_hub(source)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else error
        raise InvalidInput(f"{shown(source)} is no LoRA adapter: adapter_config.json: {why}") from None
    if not isinstance(config, dict):
        raise InvalidInput(f"{shown(source)} is no LoRA adapter: adapter_config.json holds no mapping")
    return config


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, "adapter_config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise InvalidInput(f"{shown(source)} is no folder, and the hub does not give it: {why}") from None


def adapter_arguments(model: Model) -> dict[str, Any]:
    """vLLM's arguments for the settings' adapters: as large as they need and no larger. Empty without adapters.

    Raises:
        SettingsError: an adapter can't be read, or is of a higher rank than vLLM takes.
    """
    if not model.adapters:
        return {}
    highest = 1
    for adapter in model.adapters:
        try:
            highest = max(highest, rank(adapter.source))
        except InvalidInput as error:
            raise SettingsError(f"models: {model.name}: adapters: {adapter.name}: source: {error.message}") from None
    return {
        "enable_lora": True,
        "max_lora_rank": _allowed_rank(model, highest),
        "max_loras": min(len(model.adapters), MAX_IN_BATCH),
        "max_cpu_loras": len(model.adapters) + SPARE,
    }


def _allowed_rank(model: Model, highest: int) -> int:
    for allowed in RANKS:
        if highest <= allowed:
            return allowed
    raise SettingsError(f"models: {model.name}: adapters: one has rank {highest}; vLLM takes at most {RANKS[-1]}")
