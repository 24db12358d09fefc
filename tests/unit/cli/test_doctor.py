"""What `pomelo doctor` says about a provider that the command and the running server see differently."""

from __future__ import annotations

import pytest

from pomelo.cli.doctor import _as_served
from pomelo.cli.findings import Finding


@pytest.mark.parametrize(
    ("state", "has_it", "expected", "words"),
    [
        ("off", True, "ok", "configured in the running server"),
        ("off", False, "off", "as it was"),
        ("ok", True, "ok", "as it was"),
        ("ok", False, "warning", "as it was, but the running server was started without it: restart it"),
        ("broken", False, "broken", "as it was"),
        ("broken", True, "broken", "as it was"),
    ],
)
def test_a_provider_is_reported_with_what_the_server_has(
    state: str, has_it: bool, expected: str, words: str
) -> None:
    found = _as_served(Finding("openai", state, "as it was"), has_it)
    assert (found.name, found.state) == ("openai", expected)
    assert found.detail.startswith(words)
