"""How messages become a prompt where it is not vLLM's own app that makes it: by the same settings."""

from __future__ import annotations

from vllm.exceptions import VLLMValidationError
from vllm.renderers import ChatParams
from vllm.renderers.chat_utils import load_chat_template

from hycluster.errors import SettingsError
from hycluster.settings.model import Model


def chat_params(model: Model) -> ChatParams:
    """Template, form of contents and arguments of a model's ``api`` settings.

    Raises:
        SettingsError: there is no such template.
    """
    api = model.api
    try:
        template = load_chat_template(api.get("chat_template"))
    except (VLLMValidationError, ValueError, OSError) as error:
        raise SettingsError(f"models: {model.name}: api.chat_template: {error}") from error
    return ChatParams(
        chat_template=template,
        chat_template_content_format=api.get("chat_template_content_format", "auto"),
        chat_template_kwargs={"add_generation_prompt": True} | (api.get("default_chat_template_kwargs") or {}),
    )
