"""OpenAI: chat completions with its own field for the end user, and its own stream options.

It enforces the maximum of each model itself, and counts what a request allows toward its limits.
"""

from __future__ import annotations

from pomelo.providers.chat.chat import Chat, Profile


class OpenAI(Chat):
    base_url = "https://api.openai.com/v1"
    profile = Profile(
        "openai",
        user_field="safety_identifier",
        user_most=64,
        text_lists=True,
        hidden_thinking=False,
        no_parameters="",
        sends_maximum=False,
        # Padding against eavesdroppers who count bytes costs time, and is of no use here.
        stream_options={"include_usage": True, "include_obfuscation": False},
    )
