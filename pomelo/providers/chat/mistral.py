"""Mistral: chat completions that refuse unknown fields.

Its base URL has no /v1. The vendor refuses names of authors, and ids of tool calls that are not nine letters
or digits. The last chunk of a stream has the count of tokens without a request for it. Whether the vendor
accepts `stream_options` is uncertain, so they are sent only if a route has `stream_usage = "option"`.
"""

from __future__ import annotations

import re

from pomelo.providers.base import Probe
from pomelo.providers.chat.chat import Chat, Profile


class Mistral(Chat):
    base_url = "https://api.mistral.ai"
    probe = Probe("/v1/models")
    path = "/v1/chat/completions"
    profile = Profile(
        "mistral",
        seed_field="random_seed",
        user_field="none",
        stream_usage="always",
        # Zero is refused. A tiny value has the same effect: only the most likely token is left.
        minimums={"top_p": 1e-6},
        strict_order=True,
        message_names=False,
        text_lists=True,
        hidden_thinking=False,
        call_ids=re.compile(r"[A-Za-z0-9]{9}"),
        meanings={"invalid_request_message_order": "invalid_parameter", "3230": "invalid_parameter"},
    )
