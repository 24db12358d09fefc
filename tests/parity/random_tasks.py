"""Random bodies of tasks: valid ones, and ones with some of the values that have been refused or misread."""

from __future__ import annotations

import base64
from collections.abc import Callable
from random import Random
from typing import Any

from tests.tasks import TASK_BODIES

PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
URLS = (
    PIXEL, PIXEL.replace("data:", "DATA:"), PIXEL.replace("image/png", "IMAGE/PNG;a=b"), PIXEL.replace("image/png", ""),
    PIXEL.replace(";base64", ""), PIXEL[:60], f" {PIXEL}\n", "", "data:", "data:image/png;base64,", "ftp://a",
    "https://example.com/a.png", "data:text/plain;base64,aGk=",
)  # fmt: skip
TEXTS = (
    "", " ", "a", "\n", "\0", "\u200b", "\ufeff", "é", "e\u0301", "🦊", "\ud7ff", "\uffff", "\U0010ffff", "\x7f", "\x85", "\u2028",
    "null", "0", "-1", "true", "=1+1", "<b>", "\\", '"', "a\tb", "a.b", "..", "%00", "[[words:3]]",
    *("x" * length for length in (64, 65, 256, 257, 513)), "é" * 256, "🦊" * 64,
)  # fmt: skip
INTEGERS = (
    0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 32, 33, 63, 64, 65, 100, 128, 255, 256, 512, 1024, 1440, 1441, 2049, 4096,
    2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**32, 2**53, 2**53 + 1, 2**63 - 1, -(2**63),
)  # fmt: skip
SMALL_INTEGERS = tuple(each for each in INTEGERS if -(2**31) <= each < 2**31)
NUMBERS = (
    0,
    -0.0,
    1,
    -1,
    2.0,
    2.0000001,
    -2,
    0.1,
    0.7,
    0.69,
    1.2,
    1.21,
    5e-324,
    1e308,
    -1e308,
    1.5,
    10,
    20.01,
    2**53,
)
# Not an empty language or format: REST refuses it, and over gRPC it is the same message as without the field.
LANGUAGES = (
    "en", "EN", "de", "deu", "ger", "en-US", "en_US", "zh-Hans", "cmn", "xx", "english", "pt-br", "iw", "no", "fil",
    "und", "mul", "i-klingon", "x-foo", "en-", "-en", "en--US", " en",
)  # fmt: skip
FORMATS = (
    "mp3_44100_128", "mp3_44100_193", "wav_16000", "wav_48000", "pcm_16000", "ulaw_8000", "ulaw_16000", "alaw_8000",
    "opus_48000_64", "opus_48000_256", "MP3_44100_128", "mp3", "pcm_16000_16", "png",
)  # fmt: skip
FILES = (
    b"a",
    b"RIFF",
    b"ID3",
    b"\xff\xfb\x90\x00" * 50,
    b"OggS" * 10,
    bytes(1000),
    b"fLaC" + bytes(50),
    b"[[error:overloaded]]",
)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}
PREFERENCES = (
    "handling=strict",
    "handling=lenient",
    "HANDLING=STRICT",
    'handling="strict"',
    "foo, handling=strict",
    "strict",
)


class RandomTasks:
    """Makes bodies; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.pick = self.random.choice

    def body(self) -> dict[str, Any]:
        """The REST body of a task without `stream`, as `tests.tasks.to_task` understands it."""
        body = self.pick((self._text, self._text, self._image, self._speech))()
        self._maybe(
            0.1,
            body,
            "metadata",
            lambda: {self._label(): self._label() for _ in range(self.pick((1, 2, 17)))},
        )
        return body

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def _maybe(self, probability: float, body: dict[str, Any], name: str, value: Callable[[], Any]) -> None:
        if self.chance(probability):
            body[name] = value()

    def _some(self, value: Callable[[], Any], most: int) -> list[Any]:
        return [value() for _ in range(self.random.randint(0, most))]

    def _label(self) -> str:
        return self.pick(TEXTS) + self.pick(("", "", self.pick(TEXTS)))

    def _text(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.pick(("gpt-4", "claude-3-opus", "claude-3-haiku", "mixtral-8x7b", "GPT-4", "")),
            "messages": self._some(self._message, 4),
        }
        self._maybe(0.2, body, "max_tokens", lambda: self.pick(INTEGERS))
        for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty"):
            self._maybe(0.1, body, name, lambda: self.pick(NUMBERS))
        self._maybe(0.1, body, "seed", lambda: self.pick(INTEGERS))
        self._maybe(0.1, body, "stop", lambda: self._some(self._label, 5))
        self._maybe(0.1, body, "user", self._label)
        self._maybe(0.15, body, "tools", lambda: self._some(self._tool, 3))
        function = {"type": "function", "function": {"name": "f"}}
        self._maybe(0.1, body, "tool_choice", lambda: self.pick(("auto", "none", "required", function)))
        self._maybe(0.1, body, "parallel_tool_calls", lambda: self.chance(0.5))
        self._maybe(
            0.1, body, "reasoning_effort", lambda: self.pick(("none", "minimal", "low", "high", "max"))
        )
        self._maybe(0.1, body, "response_format", self._format)
        return body

    def _message(self) -> dict[str, Any]:
        if self.chance(0.08):
            return {
                "role": "tool",
                "tool_call_id": self.pick(("c1", "c2", self._label())),
                "content": self._label(),
            }
        if self.chance(0.08):
            content = self.pick((None, "", "x"))
            return {"role": "assistant", "content": content, "tool_calls": self._some(self._call, 2)}
        message: dict[str, Any] = {"role": self.pick(("user", "user", "assistant", "system", "developer"))}
        message["content"] = self.pick(("Hi", self._label(), self._some(self._part, 3)))
        self._maybe(0.1, message, "name", self._label)
        if self.chance(0.05):
            del message[self.pick(list(message))]
        return message

    def _part(self) -> dict[str, Any]:
        image = {"type": "image_url", "image_url": {"url": self.pick(URLS)}}
        return self.pick((image, {"type": "text", "text": self._label()}))

    def _call(self) -> dict[str, Any]:
        arguments = self.pick(("{}", "", "[]", '{"a":1}', self._label()))
        function = {"name": self.pick(("f", self._label())), "arguments": arguments}
        return {"id": self.pick(("c1", "c2", self._label())), "type": "function", "function": function}

    def _tool(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.pick(("f", "g", self._label()))}
        self._maybe(0.5, function, "description", self._label)
        schemas: tuple[dict[str, Any], ...] = (
            {},
            {"type": "object"},
            {"type": "string"},
            {"$ref": "#"},
            SCHEMA,
        )
        self._maybe(0.5, function, "parameters", lambda: self.pick(schemas))
        self._maybe(0.3, function, "strict", lambda: self.chance(0.5))
        return {"type": "function", "function": function}

    def _format(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"name": self.pick(("n", self._label())), "schema": SCHEMA}
        self._maybe(0.5, schema, "strict", lambda: self.chance(0.5))
        return self.pick(({"type": "json_object"}, {"type": "json_schema", "json_schema": schema}))

    def _image(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.pick(("flux-1-pro", "flux-1-dev", "flux-1-schnell")),
            "prompt": self.pick(("A kite", self._label())),
            "width": self.pick((64, 96, self.pick(INTEGERS[:22]))),
            "height": 64,
        }
        self._maybe(0.2, body, "num_inference_steps", lambda: self.pick(SMALL_INTEGERS))
        self._maybe(0.2, body, "guidance_scale", lambda: self.pick(NUMBERS))
        self._maybe(0.2, body, "seed", lambda: self.pick(INTEGERS))
        self._maybe(0.2, body, "output_format", lambda: self.pick(("png", "jpeg", "webp")))
        self._maybe(0.2, body, "response_format", lambda: self.pick(("url", "b64_json")))
        return body

    def _speech(self) -> dict[str, Any]:
        name = self.pick(("tts", "sts", "stt"))
        body = dict(TASK_BODIES[name])
        if name == "tts":
            self._maybe(0.4, body, "text", self._label)
        else:
            self._maybe(0.4, body, "audio", lambda: base64.b64encode(self.pick(FILES)).decode())
        if name != "sts":
            self._maybe(0.3, body, "language_code", lambda: self.pick(LANGUAGES))
        if name == "stt":
            self._maybe(0.3, body, "diarize", lambda: self.chance(0.5))
            self._maybe(0.2, body, "num_speakers", lambda: self.pick(SMALL_INTEGERS))
            self._maybe(0.3, body, "timestamps", lambda: self.pick(("none", "word", "character")))
        else:
            self._maybe(0.3, body, "voice", self._label)
            self._maybe(0.3, body, "voice_settings", self._settings)
            self._maybe(0.3, body, "output_format", lambda: self.pick(FORMATS))
            self._maybe(0.2, body, "seed", lambda: self.pick(INTEGERS))
            self._maybe(0.2, body, "response_format", lambda: self.pick(("url", "b64_json")))
        if self.chance(0.06):
            del body[self.pick([each for each in body if each != "model"])]
        return body

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        for name in ("stability", "similarity_boost", "style", "speed"):
            self._maybe(0.4, settings, name, lambda: self.pick(NUMBERS))
        self._maybe(0.3, settings, "use_speaker_boost", lambda: self.chance(0.5))
        return settings
