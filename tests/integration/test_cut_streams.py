"""What a vendor sent before its connection ended is delivered, on every protocol, however slowly it is read."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pomelo.testing import Reply, Stop
from pomelo.testing.openai_protocol import chunk
from tests.integration.house import WAYS, House, open_house, say

WAY = pytest.mark.parametrize("way", WAYS)
SSE = {"Content-Type": "text/event-stream"}
WORDS = " ".join(f"word{number}" for number in range(60))


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(tmp_path_factory.mktemp("cut")) as opened:
        yield opened


def events(count: int) -> list[bytes]:
    """The events of so many words."""
    return [chunk({"content": word + " "}) for word in WORDS.split()[:count]]


@WAY
async def test_an_answer_is_complete_whose_connection_ends_behind_the_end_marker(
    house: House, way: str
) -> None:
    for number in range(5):
        caller = await house.caller()
        prompt = f"ends behind the marker {way} {number}"
        usage = {"prompt_tokens": 9, "completion_tokens": 60}
        last = [chunk({}, finish_reason="stop", usage=usage), b"data: [DONE]\n\n"]
        # The last chunk of HTTP does not come.
        house.upstream.when(prompt, Reply(headers=SSE, steps=(*events(60), *last, Stop.CLOSE)))
        told = await house.ask(way, caller.live, say(prompt), stream=True)
        assert (told.code, told.content.split(), told.done) == ("ok", WORDS.split(), True)
        (record,) = await house.records(caller)
        assert (record.complete, record.output_tokens) == (True, 60)


@WAY
async def test_every_word_is_delivered_that_came_before_a_cut(house: House, way: str) -> None:
    for number in range(5):
        caller = await house.caller()
        prompt = f"cut {way} {number}"
        house.upstream.when(prompt, Reply(headers=SSE, steps=(*events(50), Stop.CLOSE)))
        told = await house.ask(way, caller.live, say(prompt), stream=True)
        assert told.code == "provider_failed"
        assert told.content.split() == WORDS.split()[:50]
        (record,) = await house.records(caller)
        assert (record.complete, record.output_tokens) == (False, 50)
