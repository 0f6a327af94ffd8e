"""What the usage ledger costs: for each request its line, for each token of a stream its count.

    python -m bench.ledger_cost [--requests 20000]

A line is written as an ingress process does it, into a file of its own, with a price; beside it, a thread syncs it once
a second. A token is what a collector's ``put`` takes longer for being counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hycluster.ledger.account import account_book
from hycluster.ledger.books import Books
from hycluster.ledger.keeper import Keeper
from hycluster.settings.ledger import Ledger
from hycluster.settings.price import Price, cost_of
from hycluster.storage import locate

TOKENS = 100


def lines(requests: int, folder: Path) -> list[float]:
    """Seconds of each request's account, from its beginning to its line."""
    books = Books(locate(str(folder / "ledger"), "ledger.store").writable(), folder / "open")
    keeper = Keeper(books, Ledger())
    keeper.start()
    price = Price(prompt_per_million_tokens=Decimal(1), completion_per_million_tokens=Decimal("2.5"))
    account_book.write_entry = keeper.write
    account_book.cost_of = lambda _, *tokens: cost_of(price, *tokens)
    took: list[float] = []
    for number in range(requests):
        began = time.perf_counter()
        with account_book.account(f"request-{number}", "POST /v1/chat/completions") as account:
            assert account is not None
            account.admit("m")
            account.begin("m", bulk=False)
            account.input_tokens, account.output_tokens = 100, TOKENS
            account.end()
            account.settle()
        took.append(time.perf_counter() - began)
    account_book.write_entry = None
    keeper.close()
    return took


def tokens(requests: int) -> tuple[float, float]:
    """Seconds of a token's ``put``, as it is and counted."""
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    from hycluster.gateway.counted import _count

    sequence = CompletionOutput(0, "a", [1], None, None)
    output = RequestOutput("r", None, [1, 2, 3], None, [sequence], False)
    account: Any = SimpleNamespace(input_tokens=0, cached_tokens=0, output_tokens=0)
    found = []
    for counted in (False, True):
        took = 0.0
        for _ in range(requests):
            collector = RequestOutputCollector(RequestOutputKind.DELTA, "r")
            if counted:
                _count(account, collector)
            began = time.perf_counter()
            for _ in range(TOKENS):
                collector.put(output)
                collector.output = None
            took += time.perf_counter() - began
        found.append(took / requests / TOKENS)
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    requests = parser.parse_args().requests
    with tempfile.TemporaryDirectory() as folder:
        took = sorted(lines(requests, Path(folder)))
    median_us, p99_us = 1e6 * statistics.median(took), 1e6 * took[int(0.99 * requests)]
    print(f"a request's line: median {median_us:.1f} us, p99 {p99_us:.1f} us, longest {1e3 * took[-1]:.2f} ms")
    plain, counted = tokens(max(100, requests // 20))
    print(f"a token: {1e6 * plain:.2f} us, counted {1e6 * counted:.2f} us")


if __name__ == "__main__":
    main()
