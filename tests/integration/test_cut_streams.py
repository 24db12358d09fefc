"""What a vendor sent before its connection ended is delivered, on every protocol, however slowly it is read."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pomelo.testing import Reply, Stop
from pomelo.testing.openai_wire import chunk
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOLS
from tests.tasks import text_body

WAY = pytest.mark.parametrize("way", PROTOCOLS)
SSE = {"Content-Type": "text/event-stream"}
WORDS = " ".join(f"word{number}" for number in range(60))


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("cut")) as opened:
        yield opened


def events(count: int) -> list[bytes]:
    """The events of so many words."""
    return [chunk({"content": word + " "}) for word in WORDS.split()[:count]]


@WAY
async def test_an_answer_is_complete_whose_connection_ends_behind_the_end_marker(
    house: RunningApp, way: str
) -> None:
    for number in range(5):
        caller = await house.account()
        prompt = f"ends behind the marker {way} {number}"
        usage = {"prompt_tokens": 9, "completion_tokens": 60}
        last = [chunk({}, finish_reason="stop", usage=usage), b"data: [DONE]\n\n"]
        # The last chunk of HTTP does not come.
        house.upstream.when(prompt, Reply(headers=SSE, steps=(*events(60), *last, Stop.CLOSE)))
        told = await house.ask(way, caller.live, text_body(prompt), stream=True)
        assert (told.code, told.content.split(), told.done) == ("ok", WORDS.split(), True)
        (record,) = await house.records(caller)
        assert (record.complete, record.output_tokens) == (True, 60)


@WAY
async def test_every_word_is_delivered_that_came_before_a_cut(house: RunningApp, way: str) -> None:
    for number in range(5):
        caller = await house.account()
        prompt = f"cut {way} {number}"
        house.upstream.when(prompt, Reply(headers=SSE, steps=(*events(50), Stop.CLOSE)))
        told = await house.ask(way, caller.live, text_body(prompt), stream=True)
        assert told.code == "provider_failed"
        assert told.content.split() == WORDS.split()[:50]
        (record,) = await house.records(caller)
        assert (record.complete, record.output_tokens) == (False, 50)
