"""What one request has had of the engines so far, counted as outputs come, and its line in the ledger.

A line is written when engines have nothing of the request any more and something is about to be sent: whatever its
caller has then seen is written down. Should it go on to ask engines after that, as a response with tools does, or one
with several prompts, a second line has the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from decimal import Decimal

from hycluster.auth.caller import Caller, current_caller
from hycluster.ledger.entry import Entry, Outcome

logger = logging.getLogger(__name__)

Write = Callable[[Entry], None]
# By model, input, cached and output tokens: what they cost.
CostOf = Callable[[str, int, int, int], Decimal]


class Account:
    """One request's.

    Attributes:
        running: prompts that engines have, or are about to have.
        pool: the model whose gateway has admitted it; ``model`` may be an adapter of it.
        error: its caller is told that there is no answer.
        left: its caller has left.
    """

    __slots__ = (
        "_aborted", "_admitted", "_asked", "_book", "_caller", "_failed", "_told", "_written", "bulk", "cached_tokens",
        "error", "input_tokens", "left", "model", "once", "operation", "output_tokens", "pool", "request_id",
        "running", "started_at",
    )  # fmt: skip

    def __init__(self, book: AccountBook, request_id: str, operation: str, once: str = "") -> None:
        self._book = book
        self.request_id = request_id
        self.operation = operation
        self.once = once
        self.started_at = time.time()
        self.model = self.pool = ""
        self.bulk = self.error = self.left = False
        self.input_tokens = self.cached_tokens = self.output_tokens = self.running = 0
        self._caller: Caller | None = None
        self._admitted = self._asked = self._aborted = self._failed = self._written = False
        # Of the tokens, those that are in lines already.
        self._told = (0, 0, 0)

    def admit(self, model: str) -> None:
        """It is within the bounds of a model's gateway: from now on it is in the ledger, whatever becomes of it."""
        self._admitted = True
        self.model, self.pool = self.model or model, model
        self._caller = current_caller.get()

    def begin(self, model: str, *, bulk: bool) -> None:
        """Engines are about to have one more prompt of it."""
        self._asked = True
        self.running += 1
        self.model, self.bulk = model, bulk

    def end(self, *, failed: bool = False, aborted: bool = False) -> None:
        """Of one prompt all has come that will come."""
        self.running -= 1
        self._failed |= failed
        self._aborted |= aborted

    def settle(self) -> None:
        """Something of the answer is about to be sent."""
        if not self.running and self._asked:
            self._write()

    def close(self) -> None:
        """The request has ended."""
        if self._admitted:
            self._write()

    def _write(self) -> None:
        now = self.input_tokens, self.cached_tokens, self.output_tokens
        if self._written and now == self._told:
            return
        tokens = [new - old for new, old in zip(now, self._told, strict=True)]
        self._book.write(self, self._caller, requests=int(not self._written), outcome=self._outcome, tokens=tokens)
        self._written, self._told = True, now

    @property
    def _outcome(self) -> Outcome:
        if self.error or self._failed:
            return "failed" if self._asked else "refused"
        return "cancelled" if self.left or self._aborted else "finished"


account_now: ContextVar[Account | None] = ContextVar("hycluster_account", default=None)


class AccountBook:
    """Opens accounts in this process, and has their lines written, where there is a ledger.

    Attributes:
        write_entry: takes a line; None where there is no ledger.
    """

    def __init__(self) -> None:
        self.write_entry: Write | None = None
        self.cost_of: CostOf = _nothing

    @contextmanager
    def account(self, request_id: str, operation: str, *, once: str = "") -> Iterator[Account | None]:
        """The account of the request that is carried out within this block; see :attr:`Entry.once`."""
        if self.write_entry is None:
            yield None
            return
        account = Account(self, request_id, operation, once)
        before = account_now.set(account)
        try:
            yield account
        except Exception:
            account.error = True
            raise
        except BaseException:
            account.left = True
            raise
        finally:
            account_now.reset(before)
            account.close()

    def write(
        self, account: Account, caller: Caller | None, *, requests: int, outcome: Outcome, tokens: list[int]
    ) -> None:
        """Have a line written; ``tokens`` are of the input, those of it that were cached, of the output."""
        if self.write_entry is None:
            return
        self.write_entry(
            Entry(
                request_id=account.request_id,
                requests=requests,
                once=account.once,
                tenant=caller.tenant if caller else "",
                project=caller.project if caller else "",
                key=(caller.key_id or caller.key) if caller else "",
                key_name=caller.key if caller else "",
                model=account.model,
                operation=account.operation,
                tier="batch" if account.bulk else "online",
                outcome=outcome,
                input_tokens=tokens[0],
                cached_tokens=tokens[1],
                output_tokens=tokens[2],
                cost=self.cost_of(account.pool, *tokens),
                started_at=account.started_at,
                ended_at=time.time(),
            )
        )


@contextmanager
def not_in_ledger() -> Iterator[Account]:
    """An account of which no line is written, for whoever enters himself what was answered; it tells of which model."""
    account = Account(AccountBook(), "", "")
    before = account_now.set(account)
    try:
        yield account
    finally:
        account_now.reset(before)


def _nothing(_model: str, _input: int, _cached: int, _output: int) -> Decimal:
    return Decimal(0)


account_book = AccountBook()
