"""What stands for the thoughts behind tool calls: some models require them with the results of the tools, and
callers do not have them.

Google documents a signature for calls without one. DeepSeek and Kimi take any text that is not empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from re import IGNORECASE
from re import compile as pattern
from typing import Any

MISSING_TEXT = "missing_reasoning_content"
MISSING_SIGNATURE = "missing_thought_signature"

_REFUSALS = (
    (pattern(r"missing a `?thought_?signature", IGNORECASE), MISSING_SIGNATURE),
    (
        pattern(r"reasoning_content\W.{0,60}(missing|passed back)|missing \W?reasoning_content", IGNORECASE),
        MISSING_TEXT,
    ),
)

_SIGNATURE = {"google": {"thought_signature": "skip_thought_signature_validator"}}


def missing_thoughts(message: str) -> str:
    """Return our code of a refusal that asks for the thoughts, by a vendor's message; "" for any other."""
    return next((code for text, code in _REFUSALS if text.search(message)), "")


def add_placeholders(messages: Iterable[dict[str, Any]], missing: str) -> None:
    """Add to messages what stands for their thoughts. `missing` is the code of the vendor's refusal."""
    for message in messages:
        if message["role"] == "assistant":
            if missing == MISSING_TEXT:
                message["reasoning_content"] = " "
            elif "tool_calls" in message:
                message["tool_calls"][0]["extra_content"] = _SIGNATURE  # of all calls of a message
