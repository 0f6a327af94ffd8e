"""A stand-in for the pool behind an ingress process that makes summaries: a small context, a word a token."""

from __future__ import annotations

from hycluster.core import Generation, GenerationRequest, ModelCard
from hycluster.errors import InvalidInput
from tests.ingress.stand_in import MODEL, StandInGenerator

CONTEXT_TOKENS = 300


class SummarizingGenerator(StandInGenerator):
    """Refuses prompts with the word ``refuse``.

    Attributes:
        names: of the models served.
        fail_once: ends of request ids; each such request fails the first time.
        most_running: requests that were answered at the same time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names = [MODEL]
        self.fail_once: dict[str, Exception] = {}
        self.most_running = 0

    async def models(self) -> list[ModelCard]:
        self._fail()
        return [ModelCard(name, CONTEXT_TOKENS, 1) for name in self.names]

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        self.most_running = max(self.most_running, self.running + 1)
        end = (request.request_id or "").rpartition("-")[2]
        if end in self.fail_once:
            self.requests.append((request, deadline_s))
            raise self.fail_once.pop(end)
        if "refuse" in self.prompt(request):
            raise InvalidInput("prompt: refused by the stand-in")
        return await super().generate(request, deadline_s=deadline_s)

    @staticmethod
    def prompt(request: GenerationRequest) -> str:
        assert request.messages is not None
        return str(request.messages[0]["content"])

    @property
    def prompts(self) -> list[str]:
        return [self.prompt(request) for request, _ in self.requests]
