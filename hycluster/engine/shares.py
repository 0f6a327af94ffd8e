"""Several tenants' online rows in one engine: who has its slots, its blocks and the prompts' part of its steps.

The queue lets in whose counter is the lowest (:mod:`hycluster.engine.fairness`, ``waiting.py``). That is not enough
where one tenant has filled the engine before others came: it would keep all slots until its outputs end, and a long
prompt of its would take all tokens of step after step. So

- rows of a tenant that has more slots than its share, by weight, of those who want some, are *given up* for one that
  has fewer than its own and has not been served more; they wait again, as rows of batches do for online ones, and what
  the prefix cache still has of them need not be computed again. Whoever has no more than its share loses none of it;
- so are rows of one that has more than its share of the KV cache, where there are no blocks for another;
- of a step's tokens, outputs' come first, then prompts', by counter: what waits and may come in goes before the next
  chunk of a prompt whose tenant has been served more;
- prompts of a tenant that is well ahead of another one lengthen steps by a share only, unless that one too has enough
  of them to fill steps. Else the others' outputs would take several times as long, and need as many more slots;
- so do its outputs, on average over steps: where a row costs much beside a step, as on CPUs, all slots that the others
  leave would make steps twice as long. The oldest of its rows go on, the others keep their blocks and wait.

Nothing of this is done, or paid for, while only one tenant is there: what it has is then counted once a step.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.request import Request

from hycluster.engine.fairness import MOST_IDLE, OUTPUT_COST, TenantAccount, TenantAccounts, fair_shares
from hycluster.engine.step_time import StepTime, StepWork
from hycluster.engine.waiting import WaitingRequests, bill_of, is_bulk, payer_of, put_on

# Tokens that a tenant may have at once after it asked for nothing, as a part of the KV cache.
_BURST = 1 / 8
# Who lately has had so many times as much as another one, and this part of a burst on top, is ahead.
_AHEAD, _AT_LEAST = 1.5, 1 / 4
# Share by which prompts of those who are ahead may lengthen a step, also for so long after others were there; and so
# many tokens they get at least.
_CROWDING, _LINGER_S, _LEAST_TOKENS = 0.1, 2.0, 16
# Share by which their rows may do so. With less of it they would get less than what others leave, with more these wait.
_ROWS = 0.2


@dataclass(frozen=True, slots=True)
class _Claim:
    """A waiting request that is to come into the step.

    Attributes:
        served: what its tenant will have had before it.
    """

    request: Request
    account: TenantAccount
    served: float


class TenantShares:
    """Asked by a scheduler for each step, and told what rows are given.

    Args:
        waiting: the engine's queue.
        slots: rows that the engine can have.
        kv_tokens: that its cache holds.
        step_tokens: most tokens of a step.

    Attributes:
        lone: whose all online requests are that somebody pays for; None: several tenants', or that isn't known.
    """

    def __init__(self, waiting: WaitingRequests, slots: int, kv_tokens: int, step_tokens: int) -> None:
        self._waiting = waiting
        self._slots = slots
        self._kv_tokens = kv_tokens
        self._step_tokens = step_tokens
        self._burst = burst = max(step_tokens, kv_tokens * _BURST)
        self._online, self._bulk = TenantAccounts(burst), TenantAccounts(burst)
        # Those that are ahead of others, when these were last there, and what prompts of theirs may have of the step.
        self._ahead: set[TenantAccount] = set()
        self._contended_s = -math.inf
        self._left_ahead = 0
        # And what rows of theirs may add to it, in seconds; below 0 it is what they have added too much.
        self._left_ahead_s = math.inf
        self._cost = StepTime()
        self.lone: TenantAccount | None = None
        self._wanting: list[TenantAccount] = []
        self._claims: list[_Claim] = []
        self._left = 0
        self._reserved = self._met = False
        # Rows that are in this step, and those that have made way in it.
        self._taken: set[str] = set()
        self.made_way: set[str] = set()

    def __bool__(self) -> bool:
        """Anybody is known here."""
        return bool(self._online or self._bulk)

    @property
    def contended(self) -> bool:
        """Several tenants want something of this step."""
        return len(self._wanting) > 1

    def come(self, request: Request, waiting: Iterable[TenantAccount]) -> None:
        """A request that is new to the queue. ``waiting`` is who has requests there."""
        payer = payer_of(request)
        if payer is None:
            return
        accounts = self._bulk if is_bulk(request) else self._online
        bill = accounts.open(*payer, list(waiting))
        put_on(bill, request)
        if bill.account is not self.lone:
            self.lone = None

    # -- a step -------------------------------------------------------------------------------------

    def begin(self, running: list[Request], now_s: float, cost: StepTime) -> list[Request]:
        """A step begins. Returns the rows in the order in which they are to be served."""
        # A row that was kept out for what then did not come in, as there was no room for its adapter, is not again.
        self._may_reserve = self._met or not self._reserved
        self._reserved = self._met = False
        self._left = self._step_tokens
        self._waiting.held = ()
        self._claims.clear()
        self._taken.clear()
        self.made_way.clear()
        rows: dict[TenantAccount, int] = {}
        for request in running:
            if not is_bulk(request) and (bill := bill_of(request)) is not None:
                rows[bill.account] = rows.get(bill.account, 0) + 1
        self._wanting = [*rows, *(account for account in self._waiting.online_accounts if account not in rows)]
        for account in self._wanting:
            account.rows = rows.get(account, 0)
            account.pass_time(now_s)
        self._online.keep(self._wanting)
        self._bulk.keep(self._bulk_accounts(running))
        if self.contended:
            self._contended_s = now_s
            self._ahead = self._who_is_ahead(running)
        elif now_s - self._contended_s > _LINGER_S:
            self._ahead.clear()
        if self._ahead:
            self._left_ahead = _crowding_tokens(len(running), cost)
            self._may_add(running, cost)
        self.lone = self._wanting[0] if len(self._wanting) == 1 and not self._ahead else None
        return sorted(running, key=_place) if self.contended else running

    def count_alone(self, running: list[Request], tokens: Mapping[str, int], now_s: float) -> None:
        """The rows of a step that :attr:`lone` has for itself, once it is scheduled: as :meth:`given` charges each.

        Args:
            tokens: that each row has in it, by request id.
        """
        assert self.lone is not None
        self.lone.pass_time(now_s)
        computed = 0
        for request in running:
            bill = bill_of(request)
            if bill is None or request.num_computed_tokens <= bill.paid:
                continue
            if bill.paid:
                computed += request.num_computed_tokens - bill.paid
                bill.paid = request.num_computed_tokens
            else:
                cached = request.num_computed_tokens - tokens.get(request.request_id, 0)
                bill.admit(request.num_prompt_tokens, request.num_tokens, cached)
                self._online.admitted(self.lone)
        self.lone.charge(OUTPUT_COST * computed)

    def _bulk_accounts(self, running: list[Request]) -> Collection[TenantAccount]:
        """Of whom there is bulk work, where there are so many that it matters."""
        if len(self._bulk) <= MOST_IDLE:
            return ()
        rows = (_account(row) for row in running if is_bulk(row))
        return {*self._waiting.accounts, *(account for account in rows if account is not None)}

    def _may_add(self, running: list[Request], cost: StepTime) -> None:
        """What rows of those who are ahead may add to this step with the others' rows; all, if there are none."""
        others = [row for row in running if _account(row) not in self._ahead]
        self._cost = cost
        if not self.contended or not others or not cost.known:
            self._left_ahead_s = math.inf
            return
        work = StepWork(0, len(others), sum(row.num_computed_tokens for row in others))
        # What a row took too much of one step it leaves of those that follow: else one that takes more than there is
        # would never have its turn.
        self._left_ahead_s = min(0.0, self._left_ahead_s) + _ROWS * cost.predict(work)
        if self._left_ahead_s <= 0:
            self._waiting.held = self._ahead

    def _take_row(self, request: Request) -> bool:
        """Whether there is time for a row of one that is ahead, which is then taken."""
        if self._left_ahead_s <= 0:
            return False
        self._left_ahead_s -= self._cost.sequence_s + self._cost.kv_token_s * request.num_computed_tokens
        if self._left_ahead_s <= 0:
            self._waiting.held = self._ahead
        return True

    def _who_is_ahead(self, running: list[Request]) -> set[TenantAccount]:
        """Those whose prompts would fill steps by themselves, beside others whose don't and who have had less."""
        pending = dict.fromkeys(self._wanting, 0.0)
        for row in running:
            if (account := _account(row)) in pending:
                pending[account] += max(0, row.num_tokens - row.num_computed_tokens - 1)
        for account in self._wanting:
            for request in self._waiting.of(account):
                if pending[account] > self._step_tokens:
                    break
                pending[account] += request.num_tokens
        shares = fair_shares(pending, self._step_tokens)
        modest = [account for account in self._wanting if pending[account] <= shares[account]]
        if len(modest) in (0, len(self._wanting)):
            return set()
        most = _AHEAD * max(account.recent for account in modest)
        others = (account for account in self._wanting if pending[account] > shares[account])
        return {account for account in others if account.recent > most + _AT_LEAST * self._burst / account.weight}

    def claim(
        self,
        free: int,
        free_tokens: int,
        running: list[Request],
        may_leave: Callable[[Request], bool],
        is_ready: Callable[[Request], bool],
    ) -> list[Request]:
        """See who is to come in. Returns the rows that are to be given up for it.

        Args:
            free: slots.
            free_tokens: for which there are blocks, beyond those that the next tokens of all rows need.
            may_leave: whether a row's blocks can be freed now.
            is_ready: whether a request that waits can be admitted now.
        """
        leaving: list[Request] = []
        rows = {account: account.rows for account in self._wanting}
        shares = fair_shares({each: each.rows + len(self._waiting.of(each)) for each in self._wanting}, self._slots)
        turns = _Turns(self._waiting, self._slots, is_ready)
        tokens = 0
        for request, account, served in turns:
            # Those behind would not be computed in this step: nothing is to be given up for them yet.
            if tokens > self._step_tokens:
                break
            if free > 0:
                free -= 1
            else:
                if rows[account] + 1 > shares[account]:
                    turns.out.add(account)
                    continue
                over = {each: rows[each] - shares[each] for each in self._wanting if each.served >= served}
                victim = self._over_share(over, running, leaving, may_leave)
                if victim is None:
                    turns.out.add(account)
                    continue
                leaving.append(victim)
                rows[_account(victim)] -= 1  # type: ignore[index]
            rows[account] += 1
            tokens += request.num_tokens
            self._claims.append(_Claim(request, account, served))
        return leaving + self._for_blocks(free_tokens, running, leaving, may_leave)

    def _for_blocks(
        self,
        free_tokens: int,
        running: list[Request],
        leaving: list[Request],
        may_leave: Callable[[Request], bool],
    ) -> list[Request]:
        """Rows that are to be given up for the blocks of those who come in; who gets none does not come in."""
        free_tokens += sum(row.num_computed_tokens for row in leaving)
        if sum(claim.request.num_tokens for claim in self._claims) <= free_tokens:
            return []
        more: list[Request] = []
        left = [row for row in running if row not in leaving]
        held = {each: sum(row.num_computed_tokens for row in _rows_of(each, left)) for each in self._wanting}
        shares = self._kv_shares(held)
        for claim in self._claims.copy():
            needs = claim.request.num_tokens
            may_take = held[claim.account] + needs <= shares[claim.account]
            while may_take and free_tokens < needs:
                over = {each: held[each] - shares[each] for each in self._wanting if each.served >= claim.served}
                victim = self._over_share(over, left, more, may_leave)
                if victim is None:
                    break
                more.append(victim)
                held[_account(victim)] -= victim.num_computed_tokens  # type: ignore[index]
                free_tokens += victim.num_computed_tokens
            if free_tokens < needs:
                self._claims.remove(claim)
            else:
                free_tokens -= needs
                held[claim.account] += needs
        return more

    def _kv_shares(
        self, held: Mapping[TenantAccount, int], elsewhere: Mapping[TenantAccount, int] | None = None
    ) -> dict[TenantAccount, float]:
        """Shares of the KV cache's tokens; some may be wanted by what is not in the queue."""
        wanted = {
            each: float(tokens + sum(row.num_tokens for row in self._waiting.of(each)) + (elsewhere or {}).get(each, 0))
            for each, tokens in held.items()
        }
        return fair_shares(wanted, self._kv_tokens)

    def _over_share(
        self,
        over: Mapping[TenantAccount, float],
        running: list[Request],
        leaving: list[Request],
        may_leave: Callable[[Request], bool],
    ) -> Request | None:
        """A row of the one that has most beyond its share; None if nobody has, or can give it up."""
        for account in sorted(over, key=lambda each: -over[each] / each.weight):
            if over[account] <= 0:
                return None
            own = [row for row in _rows_of(account, running) if row not in leaving and may_leave(row)]
            if own:
                return min(own, key=_least_lost)
        return None

    def grant(self, request: Request, tokens: int, *, whole: bool) -> int:
        """How many of so many tokens an online row gets: fewer if others' prompts go before its own.

        Args:
            whole: it is all of them or none.
        """
        if request.request_id in self.made_way:
            return 0
        account = _account(request)
        if account in self._ahead and not self._take_row(request):
            return 0
        if account is None or not _reads(request):
            return tokens
        if account in self._ahead and tokens > 1 and not whole:
            tokens = min(tokens, self._left_ahead)
            self._left_ahead -= tokens
            if not self._left_ahead:
                # Else they would keep those out that come behind them.
                self._waiting.held = self._ahead
        if not self.contended or not self._may_reserve:
            return tokens
        others = sum(
            claim.request.num_tokens
            for claim in self._claims
            if claim.account is not account
            and claim.served <= account.served
            and claim.request.request_id not in self._taken
        )
        granted = min(tokens, max(0, self._left - others))
        if granted < tokens:
            self._reserved = True
            if whole:
                return 0
        return granted

    def victim(
        self,
        request: Request,
        running: list[Request],
        may_leave: Callable[[Request], bool],
    ) -> Request | None:
        """For a row that finds no blocks, one of a tenant that has more than its share of them; None: there is none."""
        account = _account(request)
        if account is None or not self.contended:
            return None
        # What waits with blocks in hand, as for those of the host, is not among those who want something of the step.
        parties = dict.fromkeys((account, *self._wanting))
        held = {each: sum(row.num_computed_tokens for row in _rows_of(each, running)) for each in parties}
        is_new = request not in running
        elsewhere = is_new and request not in self._waiting.of(account)
        shares = self._kv_shares(held, {account: request.num_tokens} if elsewhere else None)
        if is_new and held[account] + request.num_tokens > shares[account]:
            return None
        over = {each: held[each] - shares[each] for each in self._wanting if each.served >= account.served}
        others = [row for row in running if row is not request and row.request_id not in self._taken]
        return self._over_share(over, others, [], may_leave)

    def gave_up(self, request: Request) -> None:
        """A row has made way."""
        self.made_way.add(request.request_id)
        if (account := _account(request)) is not None:
            account.rows -= 1

    def given(self, request: Request, tokens: int, cached: int, *, is_new: bool) -> None:
        """A row has got its blocks for so many tokens.

        Args:
            cached: if it is new to the slots, how many it has that need not be computed.
        """
        self._left -= tokens
        self._taken.add(request.request_id)
        bill = bill_of(request)
        if bill is None:
            return
        if is_new:
            bill.admit(request.num_prompt_tokens, request.num_tokens, cached)
            bill.account.rows += 1
            (self._bulk if is_bulk(request) else self._online).admitted(bill.account)
            self._met = True
        else:
            bill.compute(request.num_computed_tokens + tokens)


def _crowding_tokens(rows: int, cost: StepTime) -> int:
    """Tokens of prompts that lengthen a step of so many rows by as much as those may who are ahead."""
    if not cost.known or not cost.prefill_token_s:
        return _LEAST_TOKENS
    more = _CROWDING * (cost.base_s + cost.sequence_s * rows) / cost.prefill_token_s
    return max(_LEAST_TOKENS, max(0, cost.free_tokens - rows) + int(more))


def _rows_of(account: TenantAccount, running: list[Request]) -> list[Request]:
    return [row for row in running if _account(row) is account]


def _account(request: Request) -> TenantAccount | None:
    bill = bill_of(request)
    return None if bill is None else bill.account


def _reads(request: Request) -> bool:
    """It has more of a prompt before it than the token that any row has."""
    return request.num_computed_tokens + 1 < request.num_tokens


def _place(request: Request) -> tuple[bool, bool, float]:
    account = _account(request)
    return is_bulk(request), _reads(request), 0.0 if account is None else account.served


def _least_lost(request: Request) -> tuple[int, float]:
    return request.num_computed_tokens, -request.arrival_time


def _in_order(heap: Sequence[Request]) -> Iterator[Request]:
    """The smallest first, at a cost that goes by how many are taken: one may have thousands that wait."""
    ahead = [(heap[0], 0)] if heap else []
    while ahead:
        request, place = heapq.heappop(ahead)
        yield request
        for below in (2 * place + 1, 2 * place + 2):
            if below < len(heap):
                heapq.heappush(ahead, (heap[below], below))


class _Turns:
    """Online requests of tenants as they would be admitted, each with what its tenant will have had before it.

    Attributes:
        out: tenants that get no further turn.
    """

    def __init__(self, waiting: WaitingRequests, most: int, is_ready: Callable[[Request], bool]) -> None:
        self.out: set[TenantAccount] = set()
        self._turns: list[tuple[Any, ...]] = []
        for account in waiting.online_accounts:
            line = itertools.islice(filter(is_ready, _in_order(waiting.of(account))), most)
            self._push(account, line, account.served, account.rows / account.weight)

    def _push(self, account: TenantAccount, line: Iterator[Request], served: float, rows: float) -> None:
        if (request := next(line, None)) is not None:
            # The number is no two accounts', so that what is behind it is never compared.
            turn = request.priority, served, rows, request.arrival_time, id(account), account, line, request
            heapq.heappush(self._turns, turn)

    def __iter__(self) -> Iterator[tuple[Request, TenantAccount, float]]:
        while self._turns:
            _, served, rows, _, _, account, line, request = heapq.heappop(self._turns)
            if account in self.out:
                continue
            yield request, account, served
            self._push(account, line, served + request.num_tokens / account.weight, rows + 1 / account.weight)
