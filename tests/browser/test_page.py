"""The page at `/` runs every task type in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.app import Account, RunningApp, app_fixture
from tests.browser.chromium import Browser
from tests.browser.page import ANSWER, Page, open_page
from tests.tasks import TASK_BODIES

app = app_fixture()

EACH_FRONT_END = pytest.mark.parametrize("front_end", ["rest", "remote"])
WORDS = "[...document.querySelectorAll('.word span')].map((each) => each.textContent).join(' ')"
UPLOADS = f"""new MutationObserver(() => {{
  window.uploaded = {ANSWER}.querySelector('progress[aria-label=Upload]')?.value ?? window.uploaded;
}}).observe({ANSWER}, {{subtree: true, childList: true, attributes: true}}), 0"""
"""Keeps which share of a file was shown as sent."""

PLAYED = """(async () => {
  const player = document.querySelector('.answer audio');
  const ended = new Promise((resolve) => { player.addEventListener('ended', resolve); });
  await player.play();
  await ended;
  return player.duration;
})()"""


async def speech_file(app: RunningApp, caller: Account, folder: Path) -> Path:
    """Returns a file with speech that the sandbox recognizes."""
    body = TASK_BODIES["tts"] | {"output_format": "wav_16000"}
    answer = await app.post("rest", caller.test, json=body, headers={"Accept": "audio/*"})
    path = folder / "speech.wav"
    path.write_bytes(await answer.read())
    return path


@EACH_FRONT_END
async def test_a_text_is_streamed_with_its_cost_tokens_and_id(
    browser: Browser, app: RunningApp, caller: Account, front_end: str
) -> None:
    async with open_page(browser, app.urls[front_end]) as page:
        await page.sign_in(caller.test)
        await page.write("What is a pomelo?")
        assert await page.run() == "done"
        assert "What is a pomelo?" in await page.answer()
        record = await app.only_record(caller, live=False)
        assert await page.fact("Cost") == f"{record.cost / 10**6:.6f}".rstrip("0") + " credits"
        assert await page.fact("Tokens") == f"{record.input_tokens} in, {record.output_tokens} out"
        assert await page.fact("Id") == record.task_id
        assert record.request_id in await page.fact("Request")


@EACH_FRONT_END
async def test_an_image_is_shown_through_its_link(
    browser: Browser, app: RunningApp, caller: Account, front_end: str
) -> None:
    async with open_page(browser, app.urls[front_end]) as page:
        await page.sign_in(caller.test)
        await page.choose("flux-1-pro")
        await page.tab.click("summary")
        await page.tab.fill("label:width", "320")
        await page.tab.fill("label:height", "64")
        assert await page.run() == "done"
        await page.tab.until(f"{ANSWER}.querySelector('img').naturalWidth === 320")
        assert await page.fact("Adjusted") == "height=256"
        assert await page.fact("Cost") == "0.04 credits"


async def test_an_image_shows_its_progress_until_it_is_stopped(page: Page) -> None:
    await page.choose("flux-1-pro")
    await page.tab.fill("label:prompt", "[[stall]] A kite")
    await page.tab.click("button:Run")
    await page.tab.until(f"{ANSWER}.querySelector('progress')?.value >= 0.25")
    await page.tab.click("button:Stop")
    await page.tab.until(f"{ANSWER}.dataset.state === 'stopped'")


@pytest.mark.parametrize("stream", [True, False])
async def test_speech_is_played(page: Page, stream: bool) -> None:
    await page.choose("eleven-labs-tts")
    await page.tab.fill("label:text", "Hi")
    if not stream:
        await page.tab.click("label:Stream")
    assert await page.run() == "done"
    assert await page.tab.run(PLAYED) > 0.2
    assert (await page.fact("Cost")).endswith(" credits")


@EACH_FRONT_END
async def test_a_file_is_uploaded_and_transcribed_with_its_words(
    browser: Browser, app: RunningApp, caller: Account, front_end: str, tmp_path: Path
) -> None:
    async with open_page(browser, app.urls[front_end]) as page:
        await page.sign_in(caller.test)
        await page.choose("eleven-labs-stt")
        await page.tab.choose_files("label:audio", [await speech_file(app, caller, tmp_path)])
        await page.tab.run(UPLOADS)
        assert await page.run() == "done"
        assert await page.tab.run("window.uploaded") == 1  # the whole file
        assert "Good morning to you." in await page.answer()
        assert await page.tab.run(WORDS) == "Good morning to you."
        assert await page.tab.run("document.querySelectorAll('.word')[1].title") != ""


@pytest.mark.parametrize("stream", [True, False])
async def test_a_file_is_spoken_in_another_voice(
    page: Page, app: RunningApp, caller: Account, tmp_path: Path, stream: bool
) -> None:
    await page.choose("eleven-labs-sts")
    if not stream:
        await page.tab.click("label:Stream")
    await page.tab.choose_files("label:audio", [await speech_file(app, caller, tmp_path)])
    assert await page.run() == "done"
    await page.tab.until(f"{ANSWER}.querySelector('audio').duration > 0.5")


async def test_a_recording_of_the_microphone_is_transcribed(page: Page) -> None:
    # As in Firefox.
    await page.tab.run("Object.defineProperty(MediaRecorder.prototype, 'mimeType', {get: () => ''}), 0")
    await page.choose("eleven-labs-stt")
    await page.tab.click("button:Record")
    await page.tab.until("/Recording: [1-9]/.test(document.querySelector('form [role=status]').textContent)")
    await page.tab.click("button:Stop recording")
    await page.tab.until("document.querySelector('form audio').checkVisibility()")
    note = await page.tab.run("document.querySelector('form [role=status]').textContent")
    assert note.startswith("recording.webm, ")
    assert await page.run() == "done"
    assert await page.tab.run(WORDS) != ""


async def test_a_stopped_text_stream_keeps_its_text_and_shows_its_cost(
    page: Page, app: RunningApp, caller: Account
) -> None:
    await page.write("[[words:40]] [[stall]]")
    await page.tab.click("button:Run")
    await page.tab.until(f"{ANSWER}.querySelector('.text').textContent.split(' ').length > 10")
    await page.tab.click("button:Stop")
    await page.tab.until(f"{ANSWER}.dataset.state === 'stopped'")
    await app.idle(caller)
    cost = await page.fact("Cost")
    (record,) = await app.records(caller)
    assert cost == f"{record.cost / 10**6:.6f}".rstrip("0") + " credits"
    assert not record.complete


async def test_a_conversation_goes_on_with_the_answer(page: Page) -> None:
    await page.write("First")
    assert await page.run() == "done"
    await page.tab.click("button:Continue the conversation")
    turns = "[...document.querySelectorAll('.turn')]"
    assert await page.tab.run(f"{turns}.map((each) => each.querySelector('select').value)") == [
        "user", "assistant", "user",
    ]  # fmt: skip
    assert "First" in await page.tab.run(f"{turns}[1].querySelector('textarea').value")
    await page.tab.fill(".turn:last-child textarea", "Second")
    assert await page.run() == "done"
    assert 'You said: "Second"' in await page.answer()


async def test_the_playground_is_as_it_was_left_after_another_view(page: Page) -> None:
    await page.write("Remember this")
    assert await page.run() == "done"
    await page.view("models")
    await page.tab.run("history.back()")
    await page.tab.until(ANSWER)
    assert await page.tab.run("document.querySelector('.turn textarea').value") == "Remember this"
    assert "Remember this" in await page.answer()


async def test_limits_and_credits_are_those_of_the_latest_response(
    page: Page, app: RunningApp, caller: Account
) -> None:
    meters = "document.querySelector('.meters').innerText"
    assert "1,000 of 1,000 left" in await page.tab.run(meters)
    assert await page.run() == "done"
    await page.fact("Cost")
    await page.tab.until(f"{meters}.includes('999 of 1,000 left') && {meters}.includes('50 of 50 left')")
    assert "of 100,000 left" in await page.tab.run(meters)
    left = (await app.balance(caller)).available / 10**6
    await page.tab.until(f"{meters}.includes({f'{left:,.6f}'.rstrip('0')!r})")


async def test_limits_of_an_earlier_key_are_not_shown(page: Page, app: RunningApp) -> None:
    meters = "document.querySelector('.meters').innerText"
    assert await page.run() == "done"
    await page.tab.until(f"{meters}.includes('of 100,000 left')")
    await page.view("account")
    await page.tab.click("button:Forget this key")
    await page.tab.run("location.hash = '#/playground'")
    await page.sign_in((await app.account("unlimited")).test)
    await page.tab.until(f"{meters}.includes('Credits')")
    assert " left" not in await page.tab.run(meters)


async def test_a_late_answer_to_an_earlier_key_does_not_show_its_limits(page: Page, app: RunningApp) -> None:
    await page.tab.run(
        """(() => {
          const original = window.fetch;
          window.fetch = (path, options) => (!path.includes('task') ? original(path, options)
            : new Promise((resolve) => { window.answer = () => original(path, options).then(resolve); }));
        })()"""
    )
    await page.tab.click("button:Run")
    await page.tab.until("window.answer")
    await page.view("account")
    await page.tab.click("button:Forget this key")
    await page.tab.run("location.hash = '#/playground'")
    await page.sign_in((await app.account("unlimited")).test)
    meters = "document.querySelector('.meters').innerText"
    await page.tab.until(f"{meters}.includes('Credits')")
    await page.tab.run("answer().then(() => fetch('healthz')).then((response) => response.text())")
    assert " left" not in await page.tab.run(meters)


async def test_a_transcript_whose_language_is_not_known_says_so(page: Page) -> None:
    shown = await page.tab.run(
        """import('./page/outputs.js').then(({outputOf}) => {
          const output = outputOf('speech-to-text', {}, '');
          output.finish({text: 'Hm.', language: '', words: []});
          return output.element.textContent;
        })"""
    )
    assert shown == "Hm.Language: unknown"


@pytest.mark.parametrize("base", ["https://example.com", "https://example.com/media", "/media/of"])
async def test_a_link_is_opened_on_the_host_of_the_page_whatever_the_public_address(
    page: Page, base: str
) -> None:
    path = await page.tab.run(
        f"import('./page/api.js').then(({{ownMedia}}) => ownMedia('{base}/media/media_1.png?exp=1&sig=a'))"
    )
    assert path == "media/media_1.png?exp=1&sig=a"
