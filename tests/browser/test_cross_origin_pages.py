"""Pages of other origins call the REST API from a real browser."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import web

from tests.app import RunningApp, run_app
from tests.browser.chromium import Browser
from tests.tasks import TASK_BODIES

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "rest-api.md"
EXAMPLE = """const response = await fetch('https://your-domain.com/api/v1/task', {
  method: 'POST',
  headers: {
    'Authorization': 'Bearer YOUR_API_KEY',
    'Content-Type': 'application/json'
  },
  body: JSON.stringify({
    model: 'gpt-4',
    messages: [
      { role: 'user', content: 'What is the capital of France?' }
    ],
    max_tokens: 50
  })
});

const data = await response.json();
console.log(data.choices[0].message.content);
"""
EACH_FRONT_END = pytest.mark.parametrize("front_end", ["rest", "remote"])
TASK = EXAMPLE.replace("https://your-domain.com", "URL").replace("YOUR_API_KEY", "KEY")

PAGE = """<!doctype html><meta charset="utf-8"><pre id="printed"></pre>
<script>
const printed = document.getElementById("printed");
console.log = (text) => { printed.textContent += text + "\\n"; };
addEventListener("error", (event) => console.log("failed: " + event.error));
addEventListener("unhandledrejection", (event) => console.log("failed: " + event.reason));
</script>
<script type="module">
%s
console.log("finished");
</script>
"""

STREAM = """
const response = await fetch('URL/api/v1/task', {
  method: 'POST',
  headers: {'Authorization': 'Bearer KEY', 'Content-Type': 'application/json', 'Idempotency-Key': 'page-1',
            'X-Request-Id': 'page-1', 'X-Request-Timeout': '30', 'Prefer': 'handling=lenient',
            'traceparent': '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'},
  body: JSON.stringify({model: 'gpt-4', stream: true, messages: [{role: 'user', content: 'Count to ten.'}]})
});
console.log(JSON.stringify(Object.fromEntries(response.headers)));
const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
for (let part; !(part = await reader.read()).done;) console.log(part.value);
"""

SPEECH = """
const headers = {'Authorization': 'Bearer KEY', 'Content-Type': 'application/json'};
const task = {model: 'eleven-labs-tts', text: 'Good morning', voice: 'adam'};
const post = (more) => fetch('URL/api/v1/task', {method: 'POST', body: JSON.stringify(task), headers: {...headers, ...more}});
const raw = await (await post({'Accept': 'audio/*'})).arrayBuffer();
const {audio} = await (await post({})).json();
const linked = await fetch(audio.url);
const part = await fetch(audio.url, {headers: {'Range': 'bytes=10-19'}});
console.log(JSON.stringify({
  raw: raw.byteLength, whole: (await linked.arrayBuffer()).byteLength, inline: atob(audio.b64_json).length,
  part: (await part.arrayBuffer()).byteLength, range: part.headers.get('Content-Range')
}));
"""

MEDIA = """
const headers = {'Authorization': 'Bearer KEY', 'Content-Type': 'application/json'};
const run = async (task) => (await fetch('URL/api/v1/task', {
  method: 'POST', headers, body: JSON.stringify({...task, response_format: 'url'})})).json();
const image = new Image();
image.crossOrigin = CROSS_ORIGIN;
image.src = (await run({model: 'flux-1-pro', prompt: 'A lake', width: 320, height: 200})).data[0].url;
document.body.append(image);
await image.decode();
const canvas = document.createElement('canvas').getContext('2d');
canvas.drawImage(image, 0, 0);
let readable = true;
try { canvas.getImageData(0, 0, 1, 1) } catch { readable = false }
const audio = new Audio();
audio.crossOrigin = CROSS_ORIGIN;
audio.src = (await run({model: 'eleven-labs-tts', text: 'Good morning', voice: 'adam'})).audio.url;
await audio.play();
await new Promise((resolve) => audio.addEventListener('ended', resolve));
console.log(JSON.stringify({
  width: image.naturalWidth, readable, played: audio.currentTime, duration: audio.duration}));
"""

TAB = """(() => {
  const media = document.querySelector('video, audio, img');
  return media?.complete || media?.ended
    ? JSON.stringify({done: true, width: media.naturalWidth, played: media.currentTime}) : '';
})()"""

REFUSED = """
const body = JSON.stringify({model: 'gpt-4', messages: [{role: 'user', content: 'Hi'}]});
const post = async (path, key, body) => {
  const headers = {'Authorization': 'Bearer ' + key, 'Content-Type': 'application/json'};
  const response = await fetch('URL' + path, {method: 'POST', headers, body});
  const {error} = await response.json();
  return [response.status, error?.code, response.headers.get('Retry-After') !== null,
          response.headers.get('X-RateLimit-Remaining'), response.headers.get('X-Request-Id').startsWith('req_')];
};
const responses = [await post('/api/v1/task', 'wrong', body), await post('/nowhere', 'KEY', body),
                 await post('/api/v1/models', 'KEY', body), await post('/api/v1/task', 'KEY', '{')];
for (let i = 0; i < 6; i++) responses.push(await post('/api/v1/task', 'KEY', body));
console.log(JSON.stringify(responses));
"""


@dataclass
class Pages:
    """A web server with a page that runs `script`, on an allowed and on a foreign origin."""

    allowed: str
    foreign: str
    script: str = ""
    policy: str = "unsafe-none"
    """Its Cross-Origin-Embedder-Policy."""


@pytest.fixture(scope="module")
async def pages() -> AsyncIterator[Pages]:
    """Serves a page on two origins."""

    async def page(request: web.Request) -> web.Response:
        headers = {"Cross-Origin-Embedder-Policy": served.policy}
        return web.Response(text=PAGE % served.script, content_type="text/html", headers=headers)

    site = web.Application()
    site.router.add_get("/", page)
    runner = web.AppRunner(site)
    await runner.setup()
    try:
        for _ in range(2):
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        served = Pages(*(f"http://{host}:{port}" for host, port in runner.addresses))
        yield served
    finally:
        await runner.cleanup()


@pytest.fixture(scope="module", name="app")
async def _app(pages: Pages, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    settings = {"cors_origins": (pages.allowed,)}
    folder = tmp_path_factory.mktemp("cors")
    async with run_app(folder, settings=settings, gateway_settings=settings) as opened:
        yield opened


@EACH_FRONT_END
async def test_a_page_of_an_allowed_origin_runs_the_documented_example(
    browser: Browser, pages: Pages, app: RunningApp, front_end: str
) -> None:
    assert f"```javascript\n{EXAMPLE}```" in DOCUMENTATION.read_text()
    caller = await app.account("all")
    pages.script = TASK.replace("URL", app.urls[front_end]).replace("KEY", caller.test)
    printed = await browser.read(pages.allowed, "printed", "finished")
    assert "What is the capital of France?" in printed
    assert "Pomelo sandbox" in printed
    assert len(await app.records(caller)) == 1


@EACH_FRONT_END
async def test_the_browser_blocks_a_page_of_another_origin_before_a_task_runs(
    browser: Browser, pages: Pages, app: RunningApp, front_end: str
) -> None:
    caller = await app.account("all")
    pages.script = TASK.replace("URL", app.urls[front_end]).replace("KEY", caller.test)
    printed = await browser.read(pages.foreign, "printed", "failed")
    assert printed.strip() == "failed: TypeError: Failed to fetch"
    assert await app.records(caller) == []


@EACH_FRONT_END
async def test_a_page_reads_a_stream_and_the_rate_limit_headers(
    browser: Browser, pages: Pages, app: RunningApp, front_end: str
) -> None:
    caller = await app.account("all")
    pages.script = STREAM.replace("URL", app.urls[front_end]).replace("KEY", caller.test)
    printed = await browser.read(pages.allowed, "printed", "finished")
    headers = json.loads(printed.splitlines()[0])
    assert headers["content-type"] == "text/event-stream"
    assert headers["x-request-id"] == "page-1"
    assert headers["x-pomelo-mode"] == "test"
    assert (headers["x-ratelimit-limit"], headers["x-ratelimit-remaining"]) == ("1000", "999")
    assert {"x-ratelimit-reset", "x-ratelimit-limit-tokens", "x-credits-remaining"} <= set(headers)
    assert printed.count("task.completion.chunk") > 5
    assert "data: [DONE]" in printed


@EACH_FRONT_END
async def test_a_page_reads_raw_audio_and_audio_by_link(
    browser: Browser, pages: Pages, app: RunningApp, front_end: str
) -> None:
    caller = await app.account("all")
    pages.script = SPEECH.replace("URL", app.urls[front_end]).replace("KEY", caller.test)
    sizes = json.loads((await browser.read(pages.allowed, "printed", "finished")).splitlines()[0])
    assert sizes["raw"] == sizes["whole"] == sizes["inline"] > 1000
    assert (sizes["part"], sizes["range"]) == (10, f"bytes 10-19/{sizes['whole']}")


@EACH_FRONT_END
@pytest.mark.parametrize("cross_origin", ["null", "'anonymous'"])
async def test_a_page_shows_a_linked_image_and_plays_linked_audio(
    browser: Browser, pages: Pages, app: RunningApp, front_end: str, cross_origin: str
) -> None:
    caller = await app.account("all")
    script = MEDIA.replace("URL", app.urls[front_end]).replace("KEY", caller.test)
    pages.script = script.replace("CROSS_ORIGIN", cross_origin)
    shown = json.loads((await browser.read(pages.allowed, "printed", "finished")).splitlines()[0])
    assert shown["width"] == 320
    assert shown["readable"] == (cross_origin != "null")
    assert shown["played"] == pytest.approx(shown["duration"], abs=0.1)
    assert shown["duration"] > 0.5


async def test_a_page_that_requires_permission_to_embed_shows_a_linked_image_and_plays_linked_audio(
    browser: Browser, pages: Pages, app: RunningApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = await app.account("all")
    monkeypatch.setattr(pages, "policy", "require-corp")
    script = MEDIA.replace("URL", app.urls["rest"]).replace("KEY", caller.test)
    pages.script = script.replace("CROSS_ORIGIN", "null")
    shown = json.loads((await browser.read(pages.allowed, "printed", "finished")).splitlines()[0])
    assert (shown["width"], shown["readable"]) == (320, False)


@EACH_FRONT_END
async def test_a_link_that_is_opened_in_a_tab_shows_its_image_or_plays_its_audio(
    browser: Browser, app: RunningApp, front_end: str
) -> None:
    caller = await app.account("all")
    image = await app.ask(front_end, caller.test, TASK_BODIES["image"] | {"width": 320, "height": 200})
    speech = await app.ask(front_end, caller.test, TASK_BODIES["tts"])
    shown = json.loads(await browser.evaluate(image.links[0], TAB, "done"))
    assert shown["width"] == 320
    played = json.loads(await browser.evaluate(speech.links[0], TAB, "done"))
    assert played["played"] > 0.5


@EACH_FRONT_END
async def test_a_page_reads_errors(browser: Browser, pages: Pages, app: RunningApp, front_end: str) -> None:
    caller = await app.account("five")
    pages.script = REFUSED.replace("URL", app.urls[front_end]).replace("KEY", caller.test)
    responses = json.loads((await browser.read(pages.allowed, "printed", "finished")).splitlines()[0])
    assert responses[0][:2] == [401, "invalid_api_key"]
    assert responses[1][:2] == [404, "not_found"]
    assert responses[2][:2] == [405, "method_not_allowed"]
    assert responses[3][:2] == [400, "invalid_body"]
    assert responses[-1] == [429, "rate_limit_exceeded", True, "0", True]
    assert responses[4][:2] == [200, None]
    assert all(response[4] for response in responses)
