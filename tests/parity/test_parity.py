"""The same request has the same outcome over gRPC, local REST, and REST through a remote gateway."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest

from gateway.app import open_rest
from gateway.options import GatewayOptions
from pomelo.app import App
from pomelo.call import Call
from pomelo.errors import TABLE
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.service import TaskService
from tests.conftest import Keys
from tests.driver import TaskRequest
from tests.parity.comparison import Driver, ask_all, assert_same
from tests.rest_driver import RestDriver
from tests.tasks import task_type_of

PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
TEXT_MODELS = [
    "gpt-4", "gpt-4-turbo", "gpt-3.5-turbo", "claude-3-opus", "claude-3-sonnet", "claude-3-haiku",
    "mixtral-8x7b", "mixtral-8x22b",
]  # fmt: skip
IMAGE_MODELS = ["flux-1-pro", "flux-1-dev", "flux-1-schnell"]
SPEECH_FORMATS = (
    "mp3_44100_128", "mp3_22050_32", "wav_16000", "pcm_16000", "ulaw_8000", "alaw_8000", "opus_48000_64",
)  # fmt: skip
VOICE_SETTINGS = {
    "stability": 0.5, "similarity_boost": 0.5, "style": 0.1, "use_speaker_boost": True, "speed": 1.1,
}  # fmt: skip
NOT_PROVOKED = {"unsupported_media_type", "not_found", "method_not_allowed", "model_not_found"}


@dataclass(frozen=True)
class Case:
    """A request and the error code that it must end with, or ok."""

    name: str
    body: dict[str, Any]
    code: str = "ok"
    stream: bool = False
    key: str = "test"
    request_id: str | None = None
    timeout: float | None = None


def say(text: object = "Hello, world!", model: str = "gpt-4", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def draw(prompt: str = "A red kite", model: str = "flux-1-pro", **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "width": 96, "height": 64, **more}


def audio(text: str) -> str:
    """Returns audio in base64 whose first bytes trigger a behaviour of the sandbox."""
    return base64.b64encode(text.encode()).decode()


SPEECH = {"model": "eleven-labs-tts", "text": "The quick brown fox.", "voice": "adam"}
STS = {"model": "eleven-labs-sts", "audio": audio("some audio " * 400)}
STT = {"model": "eleven-labs-stt", "audio": audio("some audio " * 400)}


def _cases() -> list[Case]:
    cases = []

    def add(name: str, body: dict[str, Any], code: str = "ok", **more: Any) -> None:
        cases.append(Case(name, body, code, **more))

    def both(name: str, body: dict[str, Any], code: str = "ok", **more: Any) -> None:
        add(f"{name} whole", body, code, **more)
        add(f"{name} stream", body, code, stream=True, **more)

    for model in TEXT_MODELS:
        both(model, say(model=model, max_tokens=100, temperature=0.7))
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [{"type": "text", "text": "What is this? Ünïcödé 🦊"},
                                      {"type": "image_url", "image_url": {"url": PIXEL}}]},
    ]  # fmt: skip
    both("conversation with an image", {"model": "gpt-4", "messages": conversation})
    both("max_tokens cuts", say(max_tokens=3))
    both("stop", say(stop=["sandbox", "."]))
    both("long", say("[[words:700]]"))
    both("short delay", say("[[delay:0.05]]"))
    both("cut", say("[[cut]]"), "provider_failed")
    both("truncated audio", SPEECH | {"text": "[[cut]] " * 40}, "provider_failed")
    both("truncated image", draw("[[cut]]"), "provider_failed")
    both("deadline that has passed", say(), "deadline_exceeded", timeout=0.000001)
    both("deadline before the first byte", say("[[delay:30]]"), "deadline_exceeded", timeout=0.4)
    both("deadline in a stall", say("[[stall]]"), "deadline_exceeded", timeout=1.5)
    for model in IMAGE_MODELS:
        both(model, draw(model=model, seed=42, num_inference_steps=4, guidance_scale=7.5))
    for form in ("png", "jpeg", "webp"):
        both(f"image as {form}", draw(output_format=form))
    for response_format in ("url", "b64_json"):
        both(f"image as {response_format}", draw(response_format=response_format))
        both(f"speech as {response_format}", SPEECH | {"response_format": response_format})
    for form in SPEECH_FORMATS:
        both(f"speech as {form}", SPEECH | {"output_format": form})
    both(
        "speech with settings", SPEECH | {"voice_settings": VOICE_SETTINGS, "seed": 7, "language_code": "en"}
    )
    for form in ("mp3_44100_128", "wav_16000"):
        both(f"speech to speech as {form}", STS | {"voice": "rachel", "output_format": form})
    for timestamps in ("none", "word", "character"):
        both(f"transcript timed by {timestamps}", STT | {"timestamps": timestamps})
    both("transcript with speakers", STT | {"diarize": True, "num_speakers": 2, "language_code": "de"})
    for code in sorted(TABLE.keys() - NOT_PROVOKED):
        both(f"text ends in {code}", say(f"[[error:{code}]]"), code)
    for code in ("content_policy_violation", "provider_unavailable", "insufficient_credits"):
        trigger = f"[[error:{code}]]"
        both(f"image ends in {code}", draw(trigger), code)
        both(f"speech ends in {code}", SPEECH | {"text": trigger}, code)
        for body in (STS | {"voice": "adam"}, STT):
            both(f"{body['model']} ends in {code}", body | {"audio": audio(trigger)}, code)
    both("live without a provider", say(model="claude-3-opus"), "provider_not_configured", key="live")
    both("live OpenAI", say(), key="live")
    both("no key", say(), "invalid_api_key", key="none")
    for key in ("junk", "revoked", "expired"):
        add(f"{key} key", say(), "invalid_api_key", key=key)
    add("the key is refused before the model", say(model="nope"), "invalid_api_key", key="junk")
    add("the model is refused before the fields", say(model="nope", temperature=9), "unsupported_model")
    add("invalid-model", say(model="invalid-model"), "unsupported_model")
    add("a key of one model", say(model="claude-3-haiku"), key="only_haiku")
    add("a key of another model", say(), "model_not_allowed", key="only_haiku")
    forbidden = "a forbidden model is refused before the fields"
    add(forbidden, say(temperature=9), "model_not_allowed", key="only_haiku")
    add("a request id comes back", say(), request_id="my-id.7")
    add("a request id comes back on errors", say(temperature=9), "invalid_parameter", request_id="my-id.8")
    add("a request id comes back without a key", say(), "invalid_api_key", key="none", request_id="my-id.9")
    add("an unusable request id is replaced", say(), request_id=None)
    for name, body, code in [
        ("no model", {"messages": []}, "missing_parameter"),
        ("an empty model", say(model=""), "missing_parameter"),
        ("no messages", {"model": "gpt-4"}, "missing_parameter"),
        ("no prompt", {"model": "flux-1-pro"}, "missing_parameter"),
        ("no text", {"model": "eleven-labs-tts", "voice": "adam"}, "missing_parameter"),
        ("no voice", {"model": "eleven-labs-tts", "text": "Hi"}, "missing_parameter"),
        ("no audio", {"model": "eleven-labs-stt"}, "missing_parameter"),
        ("no voice for speech to speech", {"model": "eleven-labs-sts", "audio": audio("x")}, "missing_parameter"),
        ("no role", {"model": "gpt-4", "messages": [{"content": "Hi"}]}, "missing_parameter"),
        ("no content", {"model": "gpt-4", "messages": [{"role": "user"}]}, "missing_parameter"),
        ("temperature 3", say(temperature=3), "invalid_parameter"),
        ("temperature -1", say(temperature=-1), "invalid_parameter"),
        ("top_p 2", say(top_p=2), "invalid_parameter"),
        ("max_tokens 0", say(max_tokens=0), "invalid_parameter"),
        ("seed -1", say(seed=-1), "invalid_parameter"),
        ("penalty 3", say(presence_penalty=3), "invalid_parameter"),
        ("other penalty -3", say(frequency_penalty=-3), "invalid_parameter"),
        ("five stops", say(stop=["a", "b", "c", "d", "e"]), "invalid_parameter"),
        ("an empty stop", say(stop=[""]), "invalid_parameter"),
        ("a long user", say(user="u" * 300), "invalid_parameter"),
        ("a remote image", say([{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]), "invalid_parameter"),
        ("an image in a system message", {"model": "gpt-4", "messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]}, "invalid_parameter"),
        ("width 4000", draw(width=4000), "invalid_parameter"),
        ("height 1", draw(height=1), "invalid_parameter"),
        ("steps 0", draw(num_inference_steps=0), "invalid_parameter"),
        ("guidance 99", draw(guidance_scale=99), "invalid_parameter"),
        ("a long prompt", draw("p" * 10_001), "context_length_exceeded"),
        ("a long text", SPEECH | {"text": "t" * 10_001}, "context_length_exceeded"),
        ("a strange format", SPEECH | {"output_format": "mp4"}, "invalid_parameter"),
        ("a strange voice", SPEECH | {"voice": "ad\nam"}, "invalid_parameter"),
        ("stability 2", SPEECH | {"voice_settings": {"stability": 2}}, "invalid_parameter"),
        ("speed 9", SPEECH | {"voice_settings": {"speed": 9}}, "invalid_parameter"),
        ("seed too large", SPEECH | {"seed": 2**32}, "invalid_parameter"),
        ("a strange language", SPEECH | {"language_code": "English"}, "invalid_parameter"),
        ("speakers 99", {"model": "eleven-labs-stt", "audio": audio("x"), "num_speakers": 99}, "invalid_parameter"),
    ]:  # fmt: skip
        both(name, body, code)
    add("a novel", say("w " * 1_000_000, model="claude-3-haiku"), "context_length_exceeded")
    return cases


CASES = _cases()


def _request(case: Case, keys: Keys) -> TaskRequest:
    other = {"none": None, "junk": "pml_test_junk"}
    key = other[case.key] if case.key in other else getattr(keys, case.key)
    return TaskRequest(case.body, key, case.stream, case.request_id, case.timeout)


def test_there_are_enough_cases_with_unique_names() -> None:
    assert len(CASES) >= 80
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_all_front_ends_have_the_same_outcome(
    case: Case, clients: Mapping[str, Driver], keys: Keys
) -> None:
    ask = _request(case, keys)
    outcomes = await ask_all(clients, ask)
    assert {name: outcome.code for name, outcome in outcomes.items()} == dict.fromkeys(clients, case.code)
    assert_same(outcomes, ask)
    if case.code == "ok":
        _assert_complete(outcomes["rest"].output, case)


def _assert_complete(output: dict[str, Any], case: Case) -> None:
    """Checks that a result has everything that its task type requires."""
    task_type = task_type_of(case.body["model"])
    if task_type == "text":
        assert output["text"]
        assert output["finish"] in ("stop", "length")
        prompt, completion, total = output["usage"]
        assert total == prompt + completion
        assert prompt > 0
    elif task_type == "speech_to_text":
        assert output["text"]
        assert bool(output["words"]) == (case.body.get("timestamps") != "none")
    else:
        response_format = case.body.get("response_format", "both")
        inline = output.get("audio") if case.stream and task_type != "image" else output.get("inline")
        assert inline if response_format != "url" or (case.stream and task_type != "image") else not inline
        assert ("linked" in output) == (response_format != "b64_json")
        if inline and "linked" in output:
            assert inline == output["linked"], "the link and the bytes are the same file"


@pytest.mark.parametrize("response_format", ["both", "b64_json"])
async def test_large_audio_is_returned_as_a_link_over_all_front_ends(
    response_format: str, clients: Mapping[str, Driver], keys: Keys
) -> None:
    body = SPEECH | {"text": "word " * 700, "output_format": "wav_48000"}
    ask = TaskRequest(
        body | ({"response_format": response_format} if response_format != "both" else {}), keys.test
    )
    outcomes = await ask_all(clients, ask)
    assert_same(outcomes, ask)
    output = outcomes["rest"].output
    assert "inline" not in output
    assert int(output["linked"].split()[0]) > 16 * 1024 * 1024


class FaultyTasks:
    """A task service with one fault, which the comparison must detect."""

    def __init__(self, inner: TaskService, fault: str) -> None:
        self.inner = inner
        self.fault = fault

    async def run_task(self, spec: TaskSpec, options: TaskOptions, call: Call) -> TaskResult:
        if self.fault == "request id":
            call.response_headers["X-Request-Id"] = "another"
        result = await self.inner.run_task(spec, options, call)
        if self.fault == "output":
            result.text.message.content[0].text += "!"
        return result

    @asynccontextmanager
    async def stream_task(
        self, spec: TaskSpec, options: TaskOptions, call: Call
    ) -> AsyncIterator[AsyncIterator[TaskEvent]]:
        async with self.inner.stream_task(spec, options, call) as events:
            yield self._without_last(events) if self.fault == "last piece" else events

    async def _without_last(self, events: AsyncIterator[TaskEvent]) -> AsyncIterator[TaskEvent]:
        async for event in events:
            if event.text_delta.text != "":
                continue
            yield event


@pytest.mark.parametrize("fault", ["none", "output", "request id", "last piece"])
async def test_a_deliberate_difference_between_front_ends_is_detected(
    fault: str, app: App, keys: Keys, http: aiohttp.ClientSession, clients: Mapping[str, Driver]
) -> None:
    services = replace(app.services, tasks=FaultyTasks(app.services.tasks, fault))
    async with open_rest(services, GatewayOptions(), "127.0.0.1", 0) as (host, port):
        broken = dict(clients, rest=RestDriver(http, f"http://{host}:{port}"))
        ask = TaskRequest(say(), keys.test, stream=fault == "last piece")
        outcomes = await ask_all(broken, ask)
    if fault == "none":
        assert_same(outcomes, ask)
    else:
        with pytest.raises(AssertionError):
            assert_same(outcomes, ask)


@pytest.mark.parametrize(("accept", "content_type"), [("image/*", "image/png"), ("image/webp", "image/webp")])
async def test_the_accept_header_decides_the_image_format(
    accept: str, content_type: str, http: aiohttp.ClientSession, rest_url: str, gateway_url: str, keys: Keys
) -> None:
    images = []
    for base in (rest_url, gateway_url):
        headers = {"Authorization": f"Bearer {keys.test}", "Accept": accept}
        async with http.post(f"{base}/api/v1/task", json=draw(), headers=headers) as response:
            assert (response.status, response.content_type) == (200, content_type)
            images.append(await response.read())
    assert images[0] == images[1]
