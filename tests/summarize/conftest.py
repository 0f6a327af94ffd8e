from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.ingress.stand_in import open_ingress
from tests.summarize.stand_in import SummarizingGenerator


@pytest.fixture
def stand_in() -> SummarizingGenerator:
    return SummarizingGenerator()


@pytest_asyncio.fixture
async def address(stand_in: SummarizingGenerator) -> AsyncIterator[str]:
    """Of a real gRPC ingress with the stand-in behind it."""
    async with open_ingress(stand_in) as ingress:
        yield f"127.0.0.1:{ingress.port}"
