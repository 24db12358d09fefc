"""Vendors that answer by the request id of Pomelo's caller, which is the first word of the task's text."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pomelo.testing import Answer, Gate, Received, Reply, Script, Speech, Transcript
from tests.tasks import TASK_BODIES, text_body

WORDS = "one two three four five six"


STOPPED_MODEL = "gpt-3.5-turbo"
"""The model whose circuit may open."""


def text(request_id: str) -> dict[str, Any]:
    return text_body(f"{request_id} Count, please.")


def speech(request_id: str) -> dict[str, Any]:
    return TASK_BODIES["tts"] | {"text": f"{request_id} Count, please. " + "la " * 20}


def request_id_of(received: Received) -> str:
    prompt = received.prompt if "messages" in received.body else received.body["text"]
    return str(prompt).split()[0]


class Vendor:
    """The answers to all requests. `scripts` has those to single requests, by request id; `calls` counts the
    requests. If a request has tools, an answer calls one of them after its words: see `TextAnswer`."""

    def __init__(self) -> None:
        self.text: Script = Answer(WORDS)
        self.speech: Script = Speech()
        self.scripts: dict[str, Script] = {}
        self.calls: Counter[str] = Counter()

    def hold(self) -> Gate:
        """Makes all later answers wait before their end until the gate opens."""
        gate = Gate()
        self.text, self.speech = Answer(WORDS, at={6: gate}), Speech(at={1: gate})
        return gate

    def __call__(self, received: Received) -> Reply:
        if received.form is not None:
            return Transcript()(received)
        request_id = request_id_of(received)
        self.calls[request_id] += 1
        script = self.scripts.get(request_id, self.text if "messages" in received.body else self.speech)
        return script if isinstance(script, Reply) else script(received)
