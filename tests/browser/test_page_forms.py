"""What a user enters in the playground: it is sent as it is, it is kept, and a recording ends when it is left."""

from __future__ import annotations

import pytest

from tests.app import app_fixture
from tests.browser.page import ANSWER, Page

app = app_fixture()

MODEL = "document.querySelector('select[name=model]').value"
TURNS = "[...document.querySelectorAll('.turn')]"
CODE = "document.querySelector('[role=tabpanel]').textContent"
NOTE = "document.querySelector('form [role=status]').textContent"
PROMPTS = """(() => {
  const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  window.tracks = [];
  window.prompts = 0;
  window.allowed = new Promise((resolve) => { window.allow = resolve; });
  navigator.mediaDevices.getUserMedia = async (options) => {
    window.prompts += 1;
    await window.allowed;
    const stream = await ask(options);
    window.tracks.push(...stream.getTracks());
    return stream;
  };
})()"""
"""Asks for the microphone until `allow()` is called, and keeps what was opened."""


@pytest.mark.parametrize(
    ("label", "value", "named"),
    [
        ("tools", '[{"type": "function"}]', "tools[0].function"),
        ("tools", "auto", "tools"),
        ("tool choice", '{"type": "function"}', "tool_choice.function"),
        ("response format", '{"type": "json_schema"}', "response_format.json_schema"),
    ],
)
async def test_a_field_of_a_wrong_form_is_sent_whatever_code_is_shown(
    page: Page, label: str, value: str, named: str
) -> None:
    await page.code("gRPC")
    await page.tab.click("summary")
    await page.tab.fill(f"label:{label}", value)
    assert "has no gRPC form" in await page.tab.run(CODE)
    assert await page.run() == "failed"
    assert named in await page.answer()
    await page.tab.fill(f"label:{label}", "")
    assert "TaskService/StreamTask" in await page.code("gRPC")


async def test_null_as_a_field_is_sent_whatever_code_is_shown(page: Page) -> None:
    await page.code("gRPC")
    await page.tab.click("summary")
    await page.tab.fill("label:tools", "null")
    assert await page.run() == "done"


async def test_a_text_that_is_too_long_is_sent_as_it_is(page: Page) -> None:
    await page.choose("eleven-labs-tts")
    await page.tab.run("document.querySelector('form textarea').select()")
    await page.tab.write("a" * 12_000)  # as a user pastes it
    assert await page.run() == "failed"
    assert "context_length_exceeded" in await page.answer()


@pytest.mark.parametrize("left", ["for a model of another type", "for another view"])
async def test_a_recording_that_is_left_ends_and_is_kept(page: Page, left: str) -> None:
    await page.tab.run(PROMPTS)
    await page.choose("eleven-labs-stt")
    await page.tab.click("button:Record")
    await page.tab.run("allow()")
    await page.tab.until(f"/Recording: [1-9]/.test({NOTE})")
    if left == "for another view":
        await page.view("models")
    else:
        await page.choose("gpt-4")
    await page.tab.until("tracks.length === 1 && tracks[0].readyState === 'ended'")
    if left == "for another view":
        await page.tab.run("history.back()")
        await page.tab.until(ANSWER)
    else:
        await page.choose("eleven-labs-stt")
    await page.tab.until(f"{NOTE}.startsWith('recording.')")
    assert await page.run() == "done"


async def test_one_recording_begins_however_often_it_is_asked_for(page: Page) -> None:
    await page.tab.run(PROMPTS)
    await page.choose("eleven-labs-stt")
    await page.tab.click("button:Record")
    await page.tab.click("button:Record")
    await page.tab.run("allow()")
    await page.tab.until(f"/Recording: [1-9]/.test({NOTE})")
    assert await page.tab.run("prompts") == 1
    await page.tab.click("button:Stop recording")
    await page.tab.until("tracks.every(({readyState}) => readyState === 'ended')")


async def test_what_was_entered_is_kept_while_a_model_of_another_type_is_chosen(page: Page) -> None:
    await page.write("Remember this")
    await page.tab.click("summary")
    await page.tab.fill("label:temperature", "0.5")
    await page.choose("flux-1-pro")
    await page.tab.fill("label:prompt", "A kite")
    await page.choose("gpt-4")
    assert await page.tab.run(f"{TURNS}[0].querySelector('textarea').value") == "Remember this"
    code = await page.tab.run(CODE)
    assert "Remember this" in code
    assert '"temperature": 0.5' in code
    await page.choose("flux-1-dev")
    assert '"prompt": "A kite"' in await page.tab.run(CODE)


async def test_a_conversation_goes_on_with_its_model_if_one_of_another_type_is_chosen(page: Page) -> None:
    await page.choose("claude-3-haiku")
    await page.write("First")
    assert await page.run() == "done"
    await page.choose("flux-1-pro")
    await page.tab.click("button:Continue the conversation")
    assert await page.tab.run(MODEL) == "claude-3-haiku"
    assert await page.tab.run(f"{TURNS}.map((each) => each.querySelector('select').value)") == [
        "user", "assistant", "user",
    ]  # fmt: skip
    assert '"role": "assistant"' in await page.tab.run(CODE)


async def test_results_of_tools_are_sent_to_their_model_if_one_of_another_type_is_chosen(page: Page) -> None:
    await page.choose("gpt-4")
    await page.tab.click("summary")
    await page.tab.click("button:Insert an example")
    assert await page.run() == "done"
    await page.choose("flux-1-pro")
    await page.tab.fill("label:Result of get_weather", "rain")
    await page.tab.click("button:Send the results")
    await page.tab.until(f"{ANSWER}.dataset.state === 'done' && {ANSWER}.querySelector('.text').textContent")
    assert "rain" in await page.answer()
    assert await page.tab.run(MODEL) == "gpt-4"
