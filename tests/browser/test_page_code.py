"""The code that the page shows for a request runs as it is."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from tests.app import RunningApp, app_fixture
from tests.browser.chromium import Browser
from tests.browser.page import ANSWER, ENDED, Page, open_page
from tests.tasks import TASK_BODIES

app = app_fixture()

HARD = 'It\'s "quoted": $HOME `id` $(id) \\ \\n true null None 日本 <b>&amp;'
"""Text with what shells, Python, JavaScript and HTML treat in their own way."""

IMAGE = b"\x89PNG\r\n\x1a\n" + b"pixels" * 100

FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": {"type": "object", "properties": {}}},
}


@pytest.fixture(name="page")
async def _page(browser: Browser, app: RunningApp) -> AsyncIterator[Page]:
    async with open_page(browser, app.urls["rest"]) as page:
        yield page


async def text(page: Page, folder: Path) -> None:
    await page.tab.fill("label:System prompt", "Be brief.")
    await page.write(HARD)
    image = folder / 'it\'s "this".png'
    image.write_bytes(IMAGE)
    await page.attach(image)
    await page.tab.fill(".attachment select", "low")
    await page.tab.click("summary")
    await page.tab.fill("label:temperature", "0.5")
    await page.tab.fill("label:stop", "one\ntwo")
    await page.tab.fill("label:user", "anna")


async def tools(page: Page, folder: Path) -> None:
    await page.write(HARD)
    await page.tab.click("summary")
    await page.tab.click("button:Insert an example")
    await page.tab.fill("label:reasoning effort", '"low"')
    await page.tab.fill("label:metadata", json.dumps({"team": HARD}))
    assert await page.run() == "done"
    await page.tab.fill("label:Result of get_weather", HARD)
    await page.tab.click("button:Send the results")
    await page.tab.until(f"{ANSWER}.querySelector('.text').textContent.includes('tool returned')")
    await page.tab.until(ENDED)
    await page.tab.fill("label:tool choice", "none")
    await page.tab.fill("label:response format", json.dumps(FORMAT))


async def image(page: Page, folder: Path) -> None:
    await page.choose("flux-1-pro")
    await page.tab.fill("label:prompt", HARD)
    await page.tab.click("summary")
    await page.tab.fill("label:output format", '"webp"')
    await page.tab.fill("label:response format", '"url"')


async def text_to_speech(page: Page, folder: Path) -> None:
    await page.choose("eleven-labs-tts")
    await page.tab.fill("label:text", HARD)
    await page.tab.click("summary")
    await page.tab.fill("label:stability", "0.25")
    await page.tab.fill("label:use speaker boost", "true")


async def speech_to_speech(page: Page, folder: Path) -> None:
    await page.choose("eleven-labs-sts")
    await page.tab.choose_files("label:audio", [folder / 'it\'s "here".wav'])
    await page.tab.click("summary")
    await page.tab.fill("label:stability", "0.25")


async def speech_to_text(page: Page, folder: Path) -> None:
    await page.choose("eleven-labs-stt")
    await page.tab.choose_files("label:audio", [folder / 'it\'s "here".wav'])
    await page.tab.click("summary")
    await page.tab.fill("label:diarize", "true")
    await page.tab.fill("label:timestamps", '"character"')


TASKS: Mapping[str, Callable[[Page, Path], Awaitable[None]]] = {
    each.__name__: each for each in (text, tools, image, text_to_speech, speech_to_speech, speech_to_text)
}
COMPARED = (
    "model",
    "user",
    "metadata",
    "input_tokens",
    "output_tokens",
    "characters",
    "images",
    "audio_ms",
    "cost",
)
"""What the usage records of equal requests have in common."""

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "curl": ("bash", "-e"),
    "Python": (sys.executable,),
    "JavaScript": ("node", "--input-type=module", "-"),
    "gRPC": ("bash", "-e"),
}
PROGRAMS = {"curl": "curl", "Python": sys.executable, "JavaScript": "node", "gRPC": "buf"}


async def run_code(form: str, code: str, key: str, folder: Path) -> str:
    """Runs code of the page in a folder; returns what it prints."""
    process = await asyncio.create_subprocess_exec(
        *COMMANDS[form],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
        env=os.environ | {"POMELO_KEY": key},
    )
    out, errors = await process.communicate(code.encode())
    assert process.returncode == 0, f"{code}\n{errors.decode()}"
    return out.decode()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("task", TASKS)
async def test_the_code_of_a_request_runs_and_is_the_same_request(
    page: Page, app: RunningApp, tmp_path: Path, task: str, stream: bool
) -> None:
    caller = await app.account("unlimited")
    speech = await app.post(
        "rest",
        caller.test,
        json=TASK_BODIES["tts"] | {"output_format": "wav_8000"},
        headers={"Accept": "audio/*"},
    )
    (tmp_path / 'it\'s "here".wav').write_bytes(await speech.read())
    await page.sign_in(caller.test)
    await TASKS[task](page, tmp_path)
    if not stream:
        await page.tab.click("label:Stream")
    assert await page.run() == "done"
    first, *_ = await app.records(caller)
    assert app.server.grpc is not None
    missing = {program for program in PROGRAMS.values() if shutil.which(program) is None}
    for form in COMMANDS:
        if PROGRAMS[form] in missing:
            continue
        code = await page.code(form)
        assert caller.test not in code
        assert "POMELO_KEY" in code
        code = code.replace(":50051", ":" + app.server.grpc.rpartition(":")[2])
        printed = await run_code(form, code, caller.test, tmp_path)
        assert '"error"' not in printed
        again, *earlier = await app.records(caller)
        assert first in earlier
        for name in COMPARED:
            assert getattr(again, name) == getattr(first, name), (form, name)
        assert (again.wire, again.complete) == ("grpc" if form == "gRPC" else "rest", True)
    if missing:
        pytest.skip(f"{', '.join(sorted(missing))} not on this machine")


async def test_curl_reads_no_file_that_a_value_seems_to_name(page: Page) -> None:
    code = await page.tab.run(
        """import('./page/code.js').then(({CodePanel}) => {
          const panel = new CodePanel();
          const body = {model: 'm', voice: '@.ssh/id_ed25519'};
          panel.show('speech-to-speech', body, new File(['x'], 'a.wav'), []);
          return panel.panel.textContent;
        })"""
    )
    assert "--form-string 'voice=@.ssh/id_ed25519'" in code
    assert code.count(" -F ") == 1, "the audio"


async def test_grpc_delivers_media_as_rest_does(page: Page) -> None:
    deliveries = await page.tab.run(
        """import('./page/grpc.js').then(({grpcRequest}) => ['url', 'b64_json', undefined].map((format) =>
          grpcRequest('image', {model: 'm', prompt: 'A kite', response_format: format}, null)
            .options?.delivery ?? ''))"""
    )
    assert deliveries == ["MEDIA_DELIVERY_LINK", "MEDIA_DELIVERY_INLINE", ""]


async def test_the_code_can_be_copied(page: Page, app: RunningApp) -> None:
    await page.sign_in((await app.account("unlimited")).test)
    await page.tab.call(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    code = await page.code("Python")
    await page.tab.click("section[aria-label=Code] .quiet")
    await page.tab.until("document.querySelector('section[aria-label=Code] .quiet').textContent === 'Copied'")
    assert await page.tab.run("navigator.clipboard.readText()") == code
