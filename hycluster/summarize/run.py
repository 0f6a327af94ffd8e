"""Documents through a running cluster: read, cut, summarized side by side, handed on in their order."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hycluster.batch.ask import Asker, first_error
from hycluster.batch.job import Summary
from hycluster.batch.prompts import summary_messages
from hycluster.batch.summaries.summarizer import Summarizer
from hycluster.client import AUTHORITIES_VARIABLE, AsyncClient
from hycluster.core import Priority, Sampling
from hycluster.errors import DeadlineExceeded, InvalidInput, SettingsError, Unavailable, UnknownModel
from hycluster.remote import Remote
from hycluster.summarize.files import read_text
from hycluster.summarize.output import Summarized
from hycluster.summarize.progress import SummaryProgress

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class SummaryOptions:
    """What is asked of every document.

    Attributes:
        model: None is the only one that is served.
        sampling: of all calls; ``max_tokens`` is of the last.
        calls_at_once: over all documents.
        together: make one summary of all files, in their order.
        retry_s: seconds for which a call is tried again while no engine can serve it.
    """

    model: str | None
    sampling: Sampling
    settings: Summary
    priority: Priority
    calls_at_once: int
    together: bool
    retry_s: float


async def summarize_files(
    files: Sequence[str],
    wish: SummaryOptions,
    address: str,
    progress: SummaryProgress,
    done: Callable[[Summarized], None],
) -> None:
    """Summarize files.

    Args:
        done: is handed each document, in order, as soon as all before it are through; also those that failed.

    Raises:
        SettingsError, UnknownModel: the wish can't be granted here.
        Unavailable: no cluster answers at the address.
        JobFailed: it did, but no engine could serve for ``retry_s``.
    """
    async with AsyncClient(address) as client:
        model = await _model(client, wish.model, address)
        ask = Asker(wish.retry_s)
        summarizer = Summarizer(
            Remote(client, ask),
            asyncio.Semaphore(wish.calls_at_once),
            ask,
            model=model,
            sampling=wish.sampling,
            settings=wish.settings,
            whole=summary_messages,
            priority=wish.priority,
        )
        run = _Run(summarizer, model, wish.calls_at_once, progress)
        try:
            async with asyncio.TaskGroup() as group:
                if wish.together:
                    documents = [group.create_task(run.together(files, done))]
                else:
                    documents = [group.create_task(run.document(file, place)) for place, file in enumerate(files)]
                for document in documents:
                    done(await document)
        except* Exception as errors:
            raise first_error(errors) from None


class _Run:
    def __init__(self, summarizer: Summarizer, model: str, documents_at_once: int, progress: SummaryProgress) -> None:
        self._summarizer = summarizer
        self._model = model
        self._progress = progress
        # So many texts are in memory at a time; each has at least one call to make.
        self._open = asyncio.Semaphore(documents_at_once)
        self._name = f"summarize-{secrets.token_hex(4)}"

    async def document(self, file: str, place: int) -> Summarized:
        async with self._open:
            begun_s = time.monotonic()
            try:
                text = await asyncio.to_thread(read_text, file)
            except InvalidInput as error:
                self._progress.finished += 1
                return Summarized((file,), self._model, 0, 0, error=error.message)
            return await self._summarized((file,), text, f"{self._name}-{place}", begun_s)

    async def together(self, files: Sequence[str], failed: Callable[[Summarized], None]) -> Summarized:
        begun_s = time.monotonic()
        texts: dict[str, str] = {}
        for file in files:
            try:
                texts[file] = await asyncio.to_thread(read_text, file)
            except InvalidInput as error:
                failed(Summarized((file,), self._model, 0, 0, error=error.message))
        if not texts:
            return Summarized(tuple(files), self._model, 0, 0, error="none of the files can be read")
        # Headings are where a text is cut first.
        text = "\n\n".join(f"# {file}\n\n{text.strip()}" for file, text in texts.items())
        return await self._summarized(tuple(texts), text, f"{self._name}-0", begun_s)

    async def _summarized(self, files: tuple[str, ...], text: str, name: str, begun_s: float) -> Summarized:
        watch = self._progress.watch()
        tree, failure = None, None
        try:
            if await self._summarizer.fits(text):
                tree = await self._summarizer.whole(text, name, watch)
            else:
                tree = await self._summarizer.summarize(text, name, watch)
        except SettingsError:
            raise
        except InvalidInput as error:
            failure = error.message
        self._progress.finished += 1
        return Summarized(files, self._model, len(text), time.monotonic() - begun_s, tree, failure)


async def _model(client: AsyncClient, wanted: str | None, address: str) -> str:
    try:
        served = [card.name for card in await client.list_models(timeout_s=CONNECT_TIMEOUT_S)]
    except (Unavailable, DeadlineExceeded):
        # gRPC does not say why it is not understood.
        encrypted = (
            "" if os.environ.get(AUTHORITIES_VARIABLE) else f"; of one with auth.tls, {AUTHORITIES_VARIABLE} too"
        )
        raise Unavailable(
            f"--address: no hycluster answers at {address}; start one with `hycluster serve`, or give its gRPC"
            f" address{encrypted}"
        ) from None
    if not served:
        raise SettingsError(f"--model: no model is served at {address}")
    if wanted is None and len(served) != 1:
        raise SettingsError(f"--model: must be one of {', '.join(map(repr, served))}")
    if wanted is not None and wanted not in served:
        raise UnknownModel(wanted, served)
    return wanted or served[0]
