from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]


async def create_responses(request: Any, raw: str) -> str:
    return f"{raw} answered"


def handler(**fields: Any) -> Any:
    given = {"create_responses": create_responses, "use_harmony": False, "parser": None} | fields
    made = SimpleNamespace(**given)
    from hycluster.engine.patches.unread_tools import patch_tools

    patch_tools(made, "m")
    return made


@pytest.mark.parametrize("parser", [None, SimpleNamespace(tool_parser_cls=None)])
async def test_tools_that_nobody_reads_are_refused(parser: Any) -> None:
    made = handler(parser=parser)
    asked: Any = SimpleNamespace(tools=["x"], tool_choice="auto")
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(
        VLLMValidationError, match=r"tools: model 'm' has no parser .* set models\[\]\.api\.tool_call_parser"
    ):
        await made.create_responses(asked, "raw")
    for tools, choice in ([], "auto"), (["x"], "none"):
        assert await made.create_responses(SimpleNamespace(tools=tools, tool_choice=choice), "raw") == "raw answered"


async def test_others_are_read() -> None:
    asked: Any = SimpleNamespace(tools=["x"], tool_choice="auto")
    for fields in ({"use_harmony": True}, {"parser": SimpleNamespace(tool_parser_cls=object)}):
        assert await handler(**fields).create_responses(asked, "raw") == "raw answered"


def test_vllms_own_still_takes_them() -> None:
    """Its chat handler refuses them in its renderer's ``render_chat``."""
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.renderers.online_renderer import OnlineRenderer

    assert "tool_parsing_unavailable" in inspect.getsource(OnlineRenderer.render_chat)
    assert "tool_parsing_unavailable" not in inspect.getsource(OnlineRenderer.render_responses)
    asked = inspect.getsource(OpenAIServingResponses._create_responses) + inspect.getsource(
        OpenAIServingResponses._validate_create_responses_input
    )
    assert "tool_parser" not in asked
