"""What a process had when it died, and words that are lost on their way: nothing is lost with them, or had twice."""

from __future__ import annotations

import asyncio

import pytest

from hycluster.auth.limits import Limit
from hycluster.errors import HyclusterError
from hycluster.limits.book import LeaseAnswer, LeaseAsk, LeaseBook, Name
from hycluster.limits.lease import SILENT_S
from hycluster.limits.reservation import RequestTokens, Reservation
from tests.limits.virtual import Away, Process, World, run

LIMIT = Limit("acme", tokens_per_minute=1000)
NAME: Name = (LIMIT.subject, "tokens_per_minute")


class Lossy(World):
    """Attributes: losing: what is lost, a process's ``word`` or the book's ``answer``."""

    losing = ""

    async def lease(self, who: str, book: str, asks: dict[Name, LeaseAsk]) -> LeaseAnswer:
        if self.losing == "word":
            raise Away
        answer = await super().lease(who, book, asks)
        if self.losing == "answer":
            raise Away
        return answer


async def reserve(process: Process, tokens: int) -> Reservation:
    return await process.limiter.reserve([LIMIT], RequestTokens(0, 0, tokens))


async def use(process: Process, tokens: int) -> None:
    reservation = await reserve(process, tokens)
    reservation.add(RequestTokens(0, 0, tokens))
    reservation.end()


def test_what_a_killed_process_had_not_used_is_given_to_others() -> None:
    now_s = 1000.0
    book = LeaseBook(lambda: now_s)
    book._began_s -= 60

    def ask(who: str, want: int, need: int) -> int:
        asked = LeaseAsk(limit=1000, want=want, need=need)
        return book.lease(who, book._id, {NAME: asked}).told[NAME].given

    assert ask("killed", 10, 0) == 10
    assert ask("other", 1000, 1000) == 990
    now_s += SILENT_S + 1
    assert ask("other", 1000, 1000) == 10


@pytest.mark.parametrize("lost", ["word", "answer"])
def test_what_was_not_used_is_told_until_it_is_heard_and_counted_once(lost: str) -> None:
    async def main() -> None:
        world = Lossy(LIMIT)
        process, other = world.process(), world.process()
        reservation = await reserve(process, 800)
        world.losing = lost
        reservation.add(RequestTokens(0, 0, 100))
        reservation.end()
        await asyncio.sleep(3)
        world.losing = ""
        await asyncio.sleep(2)
        await use(other, 900)
        with pytest.raises(HyclusterError):
            await use(other, 10)

    run(main())


def test_what_was_given_and_not_heard_of_is_given_again() -> None:
    now_s = 1000.0
    book = LeaseBook(lambda: now_s)
    book._began_s -= 60

    def ask(who: str, word: int, answered: int, need: int) -> int:
        asked = LeaseAsk(limit=1000, want=need, need=need, word=word, answered=answered)
        return book.lease(who, book._id, {NAME: asked}).told[NAME].given

    assert ask("a", 1, 0, 600) == 600
    assert ask("a", 2, 0, 600) == 600
    assert ask("a", 3, 2, 0) == 0
    assert ask("b", 1, 0, 600) == 400


def test_who_was_silent_and_lives_says_himself_what_became_of_it() -> None:
    now_s = 1000.0
    book = LeaseBook(lambda: now_s)
    book._began_s -= 60

    def ask(who: str, word: int, want: int = 0, need: int = 0, unspent: int = 0) -> int:
        asked = LeaseAsk(limit=1000, want=want, need=need, unspent=unspent, word=word, answered=word - 1)
        return book.lease(who, book._id, {NAME: asked}).told[NAME].given

    assert ask("a", 1, want=10) == 10
    now_s += SILENT_S + 1
    # It may have died.
    assert ask("b", 1, want=990, need=990) == 990
    # It has used all of it.
    assert ask("a", 2) == 0
    assert ask("b", 2, want=100, need=100) == 0
