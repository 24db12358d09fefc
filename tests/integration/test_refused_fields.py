"""A vendor refuses a value of a request: the caller's own is named, the operator's is not the caller's fault."""

from __future__ import annotations

from typing import Any

import pytest

from pomelo.testing import openai_protocol
from tests.app import RunningApp, app_fixture
from tests.driver import PROTOCOL_AND_STREAM
from tests.tasks import text_body

app = app_fixture()

JSON_FORMAT = {"type": "json_object"}


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize(
    ("theirs", "field", "value"),
    [
        ("safety_identifier", "user", "me"),
        ("max_completion_tokens", "max_tokens", 5),
        ("response_format", "response_format", JSON_FORMAT),
    ],
)
async def test_a_field_is_named_unless_only_the_operator_has_set_it(
    app: RunningApp, protocol: str, stream: bool, theirs: str, field: str, value: Any
) -> None:
    account = await app.account()
    prompt = f"<{theirs}> {protocol} {stream}"
    app.upstream.when(prompt, openai_protocol.error_reply(400, param=theirs, code="unsupported_value"))
    refused = await app.ask(protocol, account.live, text_body(prompt, **{field: value}), stream=stream)
    assert (refused.code, field in refused.message) == ("invalid_parameter", True)
    other = await app.ask(protocol, account.live, text_body(prompt), stream=stream)
    assert other.code == ("provider_failed" if field == "max_tokens" else "invalid_parameter")
