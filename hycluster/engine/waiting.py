"""An engine's waiting queue: vLLM's by priority, with a gate for bulk requests, and fair where there are tenants.

Pinned to vLLM 0.32.0. It relies on: ``schedule`` pops the request at which it peeked last, whatever came into the queue
in between; ``tests/engine/test_scheduler_contract.py``.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence

from vllm.v1.core.sched.request_queue import PriorityRequestQueue
from vllm.v1.request import Request

from hycluster.core import Priority
from hycluster.engine.fairness import Bill, TenantAccount, payer_in

# What a request has of ours: whose it is, until the scheduler has it, and its bill from then on. Those that nobody pays
# for have none, as where callers are not asked who they are.
_PAYER, _BILL = "hycluster_payer", "hycluster_bill"

_AT_ONCE = (-1.0, 0.0)


def is_bulk(request: Request) -> bool:
    """Whether a request has to make room for others."""
    return request.priority >= Priority.BATCH


def lora_of(request: Request) -> int:
    """Number of a request's adapter; 0 is none."""
    return request.lora_request.lora_int_id if request.lora_request else 0


def take_payer(request: Request) -> None:
    """Keep whose a request is, which has just been made for the scheduler, and drop its headers.

    Else vLLM gives them back with each token. Spans are made where the timeline is: docs/tracing.md.
    """
    payer = payer_in(request.trace_headers)
    request.trace_headers = None
    if payer is not None:
        setattr(request, _PAYER, payer)


def payer_of(request: Request) -> tuple[str, float] | None:
    """Tenant and weight."""
    payer: tuple[str, float] | None = getattr(request, _PAYER, None)
    return payer


def bill_of(request: Request) -> Bill | None:
    bill: Bill | None = getattr(request, _BILL, None)
    return bill


def put_on(bill: Bill, request: Request) -> None:
    setattr(request, _BILL, bill)


class WaitingRequests(PriorityRequestQueue):
    """By priority, within one the tenant first that has had the least, and of a tenant's the one that came first.

    Attributes:
        closed: bulk requests are there but not to be admitted.
        held: tenants whose requests are there but not to be admitted.
    """

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        super().__init__()
        self.closed = False
        self.held: Collection[TenantAccount] = ()
        # Those of tenants, by account; all others are in vLLM's heap.
        self._lines: dict[TenantAccount, list[Request]] = {}
        # At whom vLLM looks; it is the one that is popped next, though counters may change in between.
        self._peeked: Request | None = None
        for request in requests:
            self.add_request(request)

    @property
    def accounts(self) -> list[TenantAccount]:
        """Of whom requests wait."""
        return list(self._lines)

    @property
    def online_accounts(self) -> list[TenantAccount]:
        """Those of them that do not wait for bulk; no account has requests of both kinds."""
        return [account for account, line in self._lines.items() if not is_bulk(line[0])]

    def of(self, account: TenantAccount) -> Sequence[Request]:
        """Those that one pays for, as a heap."""
        return self._lines.get(account, ())

    def _first(self) -> Request | None:
        if not self._lines:
            return self._heap[0] if self._heap else None
        held = self.held
        heads = [(line[0].priority, each.turn, line[0]) for each, line in self._lines.items() if each not in held]
        if self._heap:
            # Nobody's: probes, and what whoever runs the cluster has computed.
            heads.append((self._heap[0].priority, _AT_ONCE, self._heap[0]))
        return min(heads)[2] if heads else None

    def _line(self, request: Request) -> list[Request]:
        bill = bill_of(request)
        return self._heap if bill is None else self._lines.setdefault(bill.account, [])

    def add_request(self, request: Request) -> None:
        heapq.heappush(self._line(request), request)

    def peek_request(self) -> Request:
        first = self._first()
        if first is None:
            raise IndexError("peek from an empty queue")
        self._peeked = first
        return first

    def pop_request(self) -> Request:
        request = self._peeked or self.peek_request()
        self._peeked = None
        line = self._line(request)
        if line[0] is request:
            heapq.heappop(line)
        else:
            line.remove(request)
            heapq.heapify(line)
        self._drop_empty(request)
        return request

    def remove_request(self, request: Request) -> None:
        self._peeked = None
        line = self._line(request)
        line.remove(request)
        heapq.heapify(line)
        self._drop_empty(request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in set(requests):
            if request in self._line(request):
                self.remove_request(request)
            self._drop_empty(request)

    def _drop_empty(self, request: Request) -> None:
        bill = bill_of(request)
        if bill is not None and not self._lines.get(bill.account, True):
            del self._lines[bill.account]

    def __bool__(self) -> bool:
        first = self._first()
        return first is not None and not (self.closed and is_bulk(first))

    def __len__(self) -> int:
        return len(self._heap) + sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted([*self._heap, *(request for line in self._lines.values() for request in line)]))

    def online(self) -> list[Request]:
        """Those that do not wait for bulk. Cheap where there are none: the top of each heap is the most urgent."""
        lines = [self._heap, *self._lines.values()]
        return [request for line in lines if line and not is_bulk(line[0]) for request in line if not is_bulk(request)]
