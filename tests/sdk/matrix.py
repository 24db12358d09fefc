"""The clients of OpenAI's API that the tests run, what each is tested for, and the table of it in docs/openai.md.

`python -m tests.sdk.matrix` writes the table into the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "openai.md"
PACKAGES = Path(__file__).parent / "js" / "package.json"
START, END = "<!-- made by tests/sdk/matrix.py -->\n", "<!-- end -->\n"

FEATURES = {
    "chat": "chat",
    "stream": "chat, streamed",
    "responses": "responses, whole and streamed",
    "tools": "tools, whole and streamed",
    "schema": "JSON schema",
    "vision": "images in messages",
    "image": "image generation",
    "speech": "speech",
    "transcription": "transcription",
    "models": "list of models",
    "errors": "errors as its own exceptions",
    "retries": "retries after `Retry-After`",
}
"""What a client is tested for: the name of the check and what the page calls it."""

TARGETS = [f"{protocol}-{mode}" for protocol in ("rest", "remote") for mode in ("test", "live")]
"""Each check runs with a test key and with a live key whose vendors a test server plays, through a gateway in the
server's process and through one elsewhere."""


@dataclass(frozen=True)
class Client:
    """A client of OpenAI's API. `packages` are the names at its registry; `script` is the program that runs a client
    for Node.js; `absent` has why a feature can't be tested; `notes` are what its users should know."""

    title: str
    packages: tuple[str, ...]
    script: str = ""
    absent: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def versions(self) -> str:
        """The tested versions, without the last number."""
        pinned = json.loads(PACKAGES.read_text())["dependencies"]
        found = [pinned[name] if self.script else version(name) for name in self.packages]
        return ", ".join(".".join(each.split(".")[:2]) for each in found)

    @property
    def features(self) -> list[str]:
        """The features that are tested."""
        return [name for name in FEATURES if name not in self.absent]


CLIENTS = {
    "python": Client("`openai` for Python", ("openai",)),
    "node": Client("`openai` for JavaScript", ("openai",), "openai.cjs"),
    "vercel": Client(
        "Vercel's AI SDK",
        ("ai", "@ai-sdk/openai-compatible"),
        "ai_sdk.cjs",
        {
            **dict.fromkeys(("responses", "speech", "transcription"), "not in `@ai-sdk/openai-compatible`"),
            "models": "the SDK lists no models",
        },
        ("an error within a stream is a part of `fullStream`, not an exception.",),
    ),
    "langchain": Client(
        "LangChain's `ChatOpenAI`",
        ("langchain-openai",),
        absent=dict.fromkeys(("image", "speech", "transcription", "models"), "not in `ChatOpenAI`"),
    ),
    "litellm": Client(
        "LiteLLM's SDK",
        ("litellm",),
        notes=(
            "models are `openai/MODEL`; give `acompletion` and the like `api_base` and `api_key`.",
            "it takes `gpt-4` for OpenAI's own, which had no JSON schemas: for them, pass "
            '`allowed_openai_params=["response_format"]`.',
            "it waits for `Retry-After` with `max_retries`.",
            "its exceptions have Pomelo's status and message; some lack the code.",
        ),
    ),
}

CASES = [
    (name, feature, target)
    for name, client in CLIENTS.items()
    for feature in client.features
    for target in TARGETS
]
"""Every check that the tests run: client, feature and target."""


def table() -> str:
    """Returns the table of the page: what is checked of each client, with which keys, and why not the rest."""
    keys = {
        (name, feature): sorted(
            {target.rpartition("-")[2] for *cell, target in CASES if cell == [name, feature]}
        )
        for name in CLIENTS
        for feature in FEATURES
    }
    rows = [
        ["", *(client.title for client in CLIENTS.values())],
        ["---"] * (len(CLIENTS) + 1),
        ["version", *(client.versions for client in CLIENTS.values())],
    ]
    rows += [
        [title, *(", ".join(reversed(keys[name, feature])) or "-" for name in CLIENTS)]
        for feature, title in FEATURES.items()
    ]
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    notes = []
    for client in CLIENTS.values():
        reasons: dict[str, list[str]] = {}
        for feature, reason in client.absent.items():
            reasons.setdefault(reason, []).append(FEATURES[feature].partition(",")[0])
        found = [f"no {', '.join(features)}: {reason}." for reason, features in reasons.items()]
        notes += [f"* {client.title}: {note}" for note in (*found, *client.notes)]
    return "\n".join([*lines, "", *notes, ""])


def page() -> str:
    """Returns the page with the table in its place."""
    return re.sub(
        f"{START}.*?{END}", lambda _: f"{START}\n{table()}\n{END}", PAGE.read_text(), flags=re.DOTALL
    )


if __name__ == "__main__":
    PAGE.write_text(page())
