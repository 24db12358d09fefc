"""Everything that a vendor sends before its connection closes is delivered, over every protocol."""

from __future__ import annotations

from pomelo.testing import Reply, Stop
from pomelo.testing.openai_protocol import chunk
from tests.app import RunningApp, app_fixture
from tests.driver import PROTOCOL
from tests.tasks import text_body

SSE = {"Content-Type": "text/event-stream"}
WORDS = " ".join(f"word{number}" for number in range(60))

app = app_fixture()


def events(count: int) -> list[bytes]:
    return [chunk({"content": word + " "}) for word in WORDS.split()[:count]]


@PROTOCOL
async def test_an_answer_is_complete_if_the_connection_closes_after_the_end_marker(
    app: RunningApp, protocol: str
) -> None:
    for number in range(5):
        account = await app.account()
        prompt = f"ends behind the marker {protocol} {number}"
        usage = {"prompt_tokens": 9, "completion_tokens": 60}
        last = [chunk({}, finish_reason="stop", usage=usage), b"data: [DONE]\n\n"]
        # The last chunk of HTTP's chunked encoding is missing.
        app.upstream.when(prompt, Reply(headers=SSE, steps=(*events(60), *last, Stop.CLOSE)))
        outcome = await app.ask(protocol, account.live, text_body(prompt), stream=True)
        assert (outcome.code, outcome.content.split(), outcome.done) == ("ok", WORDS.split(), True)
        (record,) = await app.records(account)
        assert (record.complete, record.output_tokens) == (True, 60)


@PROTOCOL
async def test_every_word_before_a_cut_is_delivered(app: RunningApp, protocol: str) -> None:
    for number in range(5):
        account = await app.account()
        prompt = f"cut {protocol} {number}"
        app.upstream.when(prompt, Reply(headers=SSE, steps=(*events(50), Stop.CLOSE)))
        outcome = await app.ask(protocol, account.live, text_body(prompt), stream=True)
        assert outcome.code == "provider_failed"
        assert outcome.content.split() == WORDS.split()[:50]
        (record,) = await app.records(account)
        assert (record.complete, record.output_tokens) == (False, 50)
