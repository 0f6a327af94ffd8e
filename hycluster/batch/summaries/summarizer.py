"""One summary of a text that is longer than the context: a tree of summaries.

The text's parts are summarized side by side. Their summaries, in order, are put together as many
as fit into a prompt and summarized again, level by level, until one is left; it alone is of the
length that was asked for. Every level has fewer summaries than the one below, or the row is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from typing import Any

from hycluster.batch.ask import Asker, RowBackend, first_error
from hycluster.batch.job import Summary
from hycluster.batch.prompts import Language, Messages, language_of, merge_messages, part_messages
from hycluster.batch.summaries.splitter import CountTokens, Part, split_text
from hycluster.batch.summaries.tree import SEAM_TOKENS, Budget, Node, Tree, budget, plan_merges
from hycluster.core import ChatFields, Generation, GenerationRequest, Priority, Sampling
from hycluster.errors import InvalidInput, UnknownModel

# No tokenizer in use makes fewer tokens of ordinary text. Where a text does have fewer, it is counted whole.
MOST_CHARACTERS_A_TOKEN = 8
# A number of parts for measuring the prompt, with more digits than any real one.
MANY = 9_999_999
# A text for measuring the preset, which is chosen by its language.
_SHORT: dict[Language, str] = {"en": "x", "zh": "文"}


class TreeWatch:
    """Is told how far a tree has got; this one does nothing with it."""

    def planned(self, calls: int) -> None:
        """So many calls more will be made: the parts, then each level's merges."""

    def answered(self, node: Node) -> None:
        """One of them has its answer."""


class Summarizer:
    """Makes trees over one model; all of its calls together hold at most the given slots.

    Args:
        whole: makes the messages that ask for the summary of a text that fits.
        ask: makes each of its calls.
        template_kwargs: for the model's chat template.
        priority: of its calls in the engines' queues.
    """

    def __init__(
        self,
        generator: RowBackend,
        slots: AbstractAsyncContextManager[Any],
        ask: Asker,
        *,
        model: str,
        sampling: Sampling,
        settings: Summary,
        template_kwargs: dict[str, Any] | None = None,
        whole: Callable[[str], Messages],
        priority: Priority = Priority.BATCH,
    ) -> None:
        self._generator = generator
        self._slots = slots
        self._asked = ask
        self._model = model
        self._sampling = sampling
        self._settings = settings
        self._template_kwargs = template_kwargs
        self._whole = whole
        self._priority = priority
        self._count: CountTokens = generator.token_counter(model)
        self._budgets: dict[Language, Budget] = {}

    async def fits(self, text: str) -> bool:
        """Whether the text and the summary asked for have room in one context.

        Raises:
            SettingsError, UnknownModel
        """
        room = (await self._budget(language_of(text))).whole
        # A token is a byte at least.
        if len(text) <= room and len(text.encode()) <= room:
            return True
        return await asyncio.to_thread(_at_most, text, self._count, room)

    async def whole(self, text: str, name: str, watch: TreeWatch | None = None) -> Tree:
        """The tree of a text that fits: one node.

        Args:
            name: the id of its request.
        """
        watch = watch or TreeWatch()
        watch.planned(1)
        async with self._slots:
            generation = await self._ask(self._whole(text), name, None)
        node = _node(generation, 0, 0, (0, len(text)), 0, ())
        watch.answered(node)
        return Tree((node,))

    async def summarize(self, text: str, name: str, watch: TreeWatch | None = None) -> Tree:
        """The tree of a text of any length.

        Args:
            name: what the ids of its requests begin with.

        Raises:
            InvalidInput: a call was refused, or summaries do not get shorter.
            SettingsError: the context is too small for the job's settings.
            JobFailed: no engine could serve one of the calls.
        """
        watch = watch or TreeWatch()
        language = language_of(text)
        budget = await self._budget(language)
        parts = await asyncio.to_thread(split_text, text, self._count, budget.part, self._settings.overlap_tokens)
        watch.planned(len(parts))
        nodes = await _side_by_side(
            [self._part(text, part, place, len(parts), budget, language, name) for place, part in enumerate(parts)],
            watch,
        )
        open_ = list(range(len(nodes)))
        level = 0
        while len(open_) > 1:
            level += 1
            counted = await asyncio.to_thread(self._count, [nodes[place].summary for place in open_])
            tokens = [count + SEAM_TOKENS for count in counted]
            runs = plan_merges(tokens, budget.merge)
            if len(runs) == len(open_):
                raise InvalidInput(
                    f"summaries do not get shorter: on level {level} no two of {len(open_)} fit into the "
                    f"{budget.merge} tokens of a prompt; they have {min(tokens)} to {max(tokens)}"
                )
            merged = [[open_[place] for place in run] for run in runs]
            several = [children for children in merged if len(children) > 1]
            watch.planned(len(several))
            made = await _side_by_side(
                [
                    self._merge(nodes, children, level, index, len(runs) == 1, budget, language, name)
                    for index, children in enumerate(several)
                ],
                watch,
            )
            places = iter(range(len(nodes), len(nodes) + len(made)))
            nodes += made
            open_ = [next(places) if len(children) > 1 else children[0] for children in merged]
        return Tree(tuple(nodes))

    async def _part(
        self, text: str, part: Part, index: int, parts: int, budget: Budget, language: Language, name: str
    ) -> Node:
        async with self._slots:
            messages = part_messages(text[part.context_start : part.end], index + 1, parts, language)
            generation = await self._ask(messages, f"{name}-0.{index}", None if parts == 1 else budget.summary)
        return _node(generation, 0, index, (part.start, part.end), part.context_start, ())

    async def _merge(
        self,
        nodes: Sequence[Node],
        children: Sequence[int],
        level: int,
        index: int,
        last: bool,
        budget: Budget,
        language: Language,
        name: str,
    ) -> Node:
        async with self._slots:
            messages = merge_messages([nodes[child].summary for child in children], language)
            generation = await self._ask(messages, f"{name}-{level}.{index}", None if last else budget.summary)
        span = nodes[children[0]].start, nodes[children[-1]].end
        return _node(generation, level, index, span, None, tuple(children))

    async def _ask(self, messages: Messages, request_id: str, max_tokens: int | None) -> Generation:
        sampling = self._sampling
        if max_tokens is not None:
            sampling = replace(sampling, max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens))
        request = GenerationRequest(
            model=self._model,
            messages=messages,
            sampling=sampling,
            priority=self._priority,
            request_id=request_id,
            chat_template_kwargs=self._template_kwargs,
        )
        return await self._asked(request_id, partial(self._generator.generate, request))

    async def _budget(self, language: Language) -> Budget:
        """Worked out once a language: the prompts' own tokens differ."""
        if language not in self._budgets:
            cards = {card.name: card for card in await self._generator.models()}
            if self._model not in cards:
                raise UnknownModel(self._model, sorted(cards))
            chat: ChatFields = {"chat_template_kwargs": self._template_kwargs} if self._template_kwargs else {}
            whole, part, merge = [
                len(await self._generator.tokenize(self._model, messages=messages, **chat))
                for messages in (
                    self._whole(_SHORT[language]),
                    part_messages("x", MANY, MANY, language),
                    merge_messages(["x"], language),
                )
            ]
            self._budgets[language] = budget(
                cards[self._model].max_model_len,
                self._sampling.max_tokens,
                self._settings,
                whole=whole,
                part=part,
                merge=merge,
            )
        return self._budgets[language]


def _at_most(text: str, count: CountTokens, tokens: int) -> bool:
    """Whether a text has at most so many tokens; a far longer one is told by its beginning."""
    head = text[: tokens * MOST_CHARACTERS_A_TOKEN]
    fits = count([head])[0] <= tokens
    if not fits or len(head) == len(text):
        return fits
    return count([text])[0] <= tokens


async def _side_by_side(calls: Sequence[Coroutine[Any, Any, Node]], watch: TreeWatch) -> list[Node]:
    """All answers in order; the first error ends the others."""

    def tell(task: asyncio.Task[Node]) -> None:
        if not task.cancelled() and task.exception() is None:
            watch.answered(task.result())

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
            for task in tasks:
                task.add_done_callback(tell)
    except* Exception as errors:
        raise first_error(errors) from None
    return [task.result() for task in tasks]


def _node(
    generation: Generation,
    level: int,
    index: int,
    span: tuple[int, int],
    context_start: int | None,
    children: tuple[int, ...],
) -> Node:
    (output,), usage = generation.outputs, generation.usage
    return Node(
        level,
        index,
        *span,
        context_start,
        children,
        output.text,
        output.finish_reason,
        usage.prompt_tokens if usage else 0,
        usage.completion_tokens if usage else len(output.token_ids),
    )
