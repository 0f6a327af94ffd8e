"""Which arguments of vLLM's API server a model may have, by where they act: at every entrance, or over HTTP alone.

What would act on a part only, or on nothing here, is refused with where to say it instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# How messages become a prompt, and what an output is made of: at both ingresses, in batch jobs, and in the engine.
EVERYWHERE = frozenset(
    {
        "chat_template", "chat_template_content_format", "default_chat_template_kwargs", "enable_auto_tool_choice",
        "exclude_tools_when_tool_choice_none", "reasoning_parser", "reasoning_parser_plugin", "tool_call_parser",
        "tool_parser_plugin", "tool_strict_level",
    }
)  # fmt: skip
# Of answers that only HTTP has, or has in this form.
OVER_HTTP = frozenset(
    {
        "anthropic_disabled_thinking_effort", "cohere_format", "cohere_is_reasoning_model",
        "enable_force_include_usage", "enable_log_deltas", "enable_log_outputs", "enable_log_requests",
        "enable_per_request_metrics", "enable_prompt_tokens_details", "enable_tokenizer_info_endpoint",
        "fingerprint_mode", "fingerprint_value", "log_error_stack", "max_log_len", "response_role",
        "return_tokens_as_token_ids", "sse_keep_alive_interval", "tool_server", "trust_request_chat_template",
        "trust_request_mm_kwargs",
    }
)  # fmt: skip
ALLOWED = EVERYWHERE | OVER_HTTP
_INSTEAD = {
    "allowed_origins": "set 'http.allowed_origins'",
    "api_key": "it would lock a part of what can be asked, and no gRPC; put what asks for keys in front of the ingress",
    "grpc_port": "set 'grpc.port'",
    "host": "set 'http.host'",
    "lora_modules": "set 'models[].adapters'",
    "middleware": "put it in front of the ingress",
    "port": "set 'http.port'",
    "root_path": "have the proxy in front of the ingress cut it off",
    "served_model_name": "set 'models[].name'",
    "uds": "set 'http.host' and 'http.port'",
}


def check_api(names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: names the argument, and what to do instead.
    """
    for name in names:
        if name in ALLOWED:
            continue
        instead = _INSTEAD.get(name)
        if instead is None and name.startswith(("ssl_", "enable_ssl")):
            instead = "TLS ends in front of the ingress"
        if instead is None:
            near = get_close_matches(name, ALLOWED, n=1)
            instead = f"did you mean {near[0]!r}?" if near else "what is the engine's is set in 'models[].engine'"
        raise ValueError(f"api.{name}: is not allowed; {instead}")
