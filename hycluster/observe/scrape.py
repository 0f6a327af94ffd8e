"""What a scrape of an address reads: all that the ingress processes have which listen there.

Ingress processes of a node share their ports, and a reader can't choose which of them its connection comes to. So each
asks the others of its node, by sockets in a folder of this user's that are as long there as their process, and shows
all of it, each process's under its own label ``ingress``. Nobody elsewhere listens at this address: a scrape of each
node counts all once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Exemplar, Sample

from hycluster.observe.catalogue import INGRESS

T = TypeVar("T")

logger = logging.getLogger(__name__)

OPENMETRICS = "application/openmetrics-text"

# One that is stopped says nothing; the rest must be there before a scrape's own timeout.
NEIGHBOUR_TIMEOUT_S = 2.0
# Three thousand series take a core a tenth of a second; this process's streams wait for so much of it at a time.
TURN_S = 0.002
# Ours and vLLM's know whose they are; those of the process itself and of its web server do not.
_LABELLED = ("hycluster_", "vllm:")


class _Family(msgspec.Struct, array_like=True):
    name: str
    what: str
    kind: str
    samples: list[tuple[str, dict[str, str], float, tuple[dict[str, str], float, float | None] | None]]


async def unhurried(pieces: Iterable[T]) -> list[T]:
    """All of them; the loop's other work has its turn between two of them."""
    found, began_s = [], time.perf_counter()
    for piece in pieces:
        found.append(piece)
        if time.perf_counter() - began_s >= TURN_S:
            await asyncio.sleep(0)
            began_s = time.perf_counter()
    return found


async def own_families(registry: CollectorRegistry = REGISTRY) -> list[Metric]:
    """What this process shows: every series with whose it is, none of when it was made."""
    return [family for family in await unhurried(map(_own, registry.collect())) if family.samples]


def _own(family: Metric) -> Metric:
    own = {} if family.name.startswith(_LABELLED) else {"ingress": INGRESS}
    shown = Metric(family.name, family.documentation, family.type)
    shown.samples = [
        Sample(one.name, one.labels | own, one.value, None, one.exemplar)
        for one in family.samples
        if not one.name.endswith("_created")
    ]
    return shown


async def merged(parts: Iterable[Sequence[Metric]]) -> list[Metric]:
    """Families of several processes as one page. What two of them show is the pool's, while one takes it over from the
    other: it is shown once.
    """
    families: dict[str, Metric] = {}
    shown: set[tuple[str, frozenset[tuple[str, str]]]] = set()

    def add(family: Metric) -> Metric:
        whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        for sample in family.samples:
            series = sample.name, frozenset(sample.labels.items())
            if series not in shown:
                shown.add(series)
                whole.samples.append(sample)
        return whole

    await unhurried(add(family) for part in parts for family in part)
    return list(families.values())


def of_replica(families: Iterable[Metric], replica_id: str) -> list[Metric]:
    """What is one replica's of all that."""
    found = []
    for family in families:
        part = Metric(family.name, family.documentation, family.type)
        part.samples = [sample for sample in family.samples if sample.labels.get("replica") == replica_id]
        if part.samples:
            found.append(part)
    return found


async def page(families: Sequence[Metric], accept: str = "") -> tuple[bytes, str]:
    """In the form that is asked for, and that form's content type."""
    encode, content_type = choose_encoder(accept)
    end = b""
    if content_type.startswith(OPENMETRICS):
        # A colon needs no escape in any of the forms, but ``vllm:`` would be ``vllm_`` for a Prometheus that asks for
        # OpenMetrics and says nothing of escapes, as those before 3.0 do.
        encode, end = partial(openmetrics.generate_latest, escaping=openmetrics.ALLOWUTF8), b"# EOF\n"

    def told(family: Metric) -> bytes:
        registry = CollectorRegistry()
        registry.register(_Gathered([family]))
        return encode(registry).removesuffix(end)

    return b"".join([*await unhurried(map(told, families)), end]), content_type


class _Gathered(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families

    def describe(self) -> Iterable[Metric]:
        return []


class Neighbours:
    """The ingress processes that listen at one address, of which this is one.

    Args:
        place: what they have in common, and nobody else has: their node and port.
        root: where folders of this machine's processes are.
    """

    def __init__(self, place: str, root: Path | None = None) -> None:
        root = root or Path(tempfile.gettempdir()) / f"hycluster-{os.getuid()}"
        self._folder = root / place
        self._own = self._folder / f"{os.getpid()}.sock"

    @contextlib.asynccontextmanager
    async def told(self) -> AsyncIterator[None]:
        """Answer the others meanwhile."""
        server = None
        try:
            for folder in (self._folder.parent, self._folder):
                _make_private(folder)
            self._own.unlink(missing_ok=True)
            server = await asyncio.start_unix_server(_tell, self._own)
        except OSError as error:
            # Nothing but metrics depends on it.
            logger.warning("other ingress processes can't ask for this one's metrics: %s", error)
        try:
            yield
        finally:
            if server is not None:
                server.close()
                self._own.unlink(missing_ok=True)

    async def families(self) -> list[Metric]:
        """Of all of them."""
        others = [path for path in sorted(self._folder.glob("*.sock")) if path != self._own]
        answers = await asyncio.gather(*(_ask(path) for path in others))
        return await merged([await own_families(), *answers])


def _make_private(folder: Path) -> None:
    """Make a folder that nobody else may look into.

    Raises:
        OSError: it is somebody else's.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not this user's alone")


async def _tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    said = [
        _Family(
            family.name,
            family.documentation,
            family.type,
            [(one.name, dict(one.labels), float(one.value), _plain(one.exemplar)) for one in family.samples],
        )
        for family in await own_families()
    ]
    with contextlib.suppress(ConnectionError):
        writer.write(msgspec.msgpack.encode(said))
        await writer.drain()
    writer.close()


def _plain(exemplar: Exemplar | None) -> tuple[dict[str, str], float, float | None] | None:
    if exemplar is None:
        return None
    at_s = exemplar.timestamp
    return dict(exemplar.labels), exemplar.value, None if at_s is None else float(at_s)


async def _ask(path: Path) -> list[Metric]:
    """Nothing of a process that has gone, or does not answer in time."""
    try:
        async with asyncio.timeout(NEIGHBOUR_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                said = msgspec.msgpack.decode(await reader.read(), type=list[_Family])
            finally:
                writer.close()
    except ConnectionRefusedError:
        # It was killed, and its socket is no more than a name.
        path.unlink(missing_ok=True)  # noqa: ASYNC240
        return []
    except (OSError, TimeoutError, msgspec.MsgspecError) as error:
        logger.warning("no metrics of the ingress process at %s: %s", path.name, error or type(error).__name__)
        return []
    return await unhurried(map(_metric, said))


def _metric(family: _Family) -> Metric:
    metric = Metric(family.name, family.what, family.kind)
    metric.samples = [
        Sample(name, labels, value, None, Exemplar(*exemplar) if exemplar else None)
        for name, labels, value, exemplar in family.samples
    ]
    return metric
