"""What refuses a message is answered without a traceback in the log.

What: vLLM's handler of ``/v1/messages`` gives what is refused, for load or for what is wrong with it, as an error of
the service's, as for other routes their exception handlers do.
Why: its route catches whatever the handler raises and logs it as an error with a traceback, a caller over a bound (429)
as well; a burst of them fills the log.
Upstream: none filed.
Version: vLLM 0.32.0. Applied by the HTTP ingress on the handler of each model's app. Watched by
``tests/engine/patches/test_message_refusals.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import functools
from typing import Any

from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError, VLLMClientError


def patch_messages(handler: Any) -> None:
    """Have a handler, vLLM's ``AnthropicServingMessages``, give refusals."""
    create = handler.create_messages

    @functools.wraps(create)
    async def answered(*asked: Any) -> Any:
        try:
            return await create(*asked)
        except (GracefulHTTPError, VLLMClientError) as error:
            return create_error_response(error)

    handler.create_messages = answered
