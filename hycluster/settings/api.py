"""Which arguments of vLLM's API server a model may have, by where they act: at every entrance, or over HTTP alone.

What would act on a part only, or on nothing here, is refused with where to say it instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from hycluster.errors import SettingsError

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
# May be a file's, relative to that of the settings.
PATHS = ("chat_template", "reasoning_parser_plugin", "tool_parser_plugin")
_FOR_THE_INGRESS = "the ingress processes are no server of vLLM's; it would be without effect"
_OF_A_SCALED_SERVER = "it is of vLLM's own way to scale out; set 'replicas' and 'parallel'"
_IN_FRONT = "put it in front of the ingress"
# All the others that vLLM has; a test compares.
_INSTEAD = {
    "allow_credentials": "CORS is 'http.allowed_origins'",
    "allowed_headers": "CORS is 'http.allowed_origins'",
    "allowed_methods": "CORS is 'http.allowed_origins'",
    "allowed_origins": "set 'http.allowed_origins'",
    "api_key": "it would lock a part of what can be asked, and no gRPC; set 'auth.enabled'",
    "data_parallel_supervisor_port": _OF_A_SCALED_SERVER,
    "disable_access_log_for_endpoints": _FOR_THE_INGRESS,
    "disable_fastapi_docs": "close '/docs' in front of the ingress",
    "disable_uvicorn_access_log": _FOR_THE_INGRESS,
    "dp_supervisor_probe_failure_threshold": _OF_A_SCALED_SERVER,
    "dp_supervisor_probe_interval_s": _OF_A_SCALED_SERVER,
    "dp_supervisor_probe_timeout_s": _OF_A_SCALED_SERVER,
    "enable_flash_late_interaction": "it is of vLLM's own server in one process with its engine",
    "enable_offline_docs": "the ingress says how '/docs' is served",
    "enable_request_id_headers": "every answer has x-request-id",
    "enable_scale_out": _OF_A_SCALED_SERVER,
    "enable_server_load_tracking": "the ingress has '/metrics'",
    "grpc_port": "set 'grpc.port'",
    "h11_max_header_count": _FOR_THE_INGRESS,
    "h11_max_incomplete_event_size": _FOR_THE_INGRESS,
    "host": "set 'http.host'",
    "lora_modules": "set 'models[].adapters'",
    "middleware": _IN_FRONT,
    "port": "set 'http.port'",
    "root_path": "have the proxy in front of the ingress cut it off",
    "served_model_name": "set 'models[].name'",
    "tokens_only": _OF_A_SCALED_SERVER,
    "uds": "set 'http.host' and 'http.port'",
    "uvicorn_log_level": _FOR_THE_INGRESS,
}
KEY_VARIABLE = "VLLM_API_KEY"


def check_environment(variables: Mapping[str, str]) -> None:
    """What vLLM's API server would take from the environment, past the settings.

    Raises:
        SettingsError: names the variable.
    """
    if variables.get(KEY_VARIABLE):
        raise SettingsError(f"{KEY_VARIABLE}: must not be set in the environment; {_INSTEAD['api_key']}")


def instead_of(name: str) -> str | None:
    """Why an argument is refused, and what to do; None for one that is not known."""
    if name.startswith(("ssl_", "enable_ssl")):
        return "set 'auth.tls'"
    return _INSTEAD.get(name)


def check_api(names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: names the argument, and what to do instead.
    """
    for name in names:
        if name in ALLOWED:
            continue
        instead = instead_of(name)
        if instead is None:
            near = get_close_matches(name, ALLOWED, n=1)
            instead = f"did you mean {near[0]!r}?" if near else "what is the engine's is set in 'models[].engine'"
        raise ValueError(f"api.{name}: is not allowed; {instead}")


_FLAG = re.compile(r"--([a-z][a-z0-9]+(?:-[a-z0-9]+)+)\b")


def in_our_words(text: str) -> str:
    """What vLLM says of an argument of its command line, by the setting that it is here."""

    def setting(flag: re.Match[str]) -> str:
        name = flag[1].replace("-", "_")
        return f"models[].{'api' if name in ALLOWED else 'engine'}.{name}"

    return _FLAG.sub(setting, text)
