"""A driver that runs a task over REST as a user would."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from tests.driver import Outcome, TaskRequest, add_call_piece, add_link, digest


class RestDriver:
    """Runs tasks at the base URL of a gateway, which has no slash at its end."""

    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self.session = session
        self.base = base

    async def __call__(self, request: TaskRequest) -> Outcome:
        """Runs a task to its end."""
        body = {**request.body, "stream": True} if request.stream else dict(request.body)
        headers = {"Authorization": f"Bearer {request.key}"} if request.key else {}
        if request.request_id:
            headers["X-Request-Id"] = request.request_id
        if request.timeout is not None:
            headers["X-Request-Timeout"] = str(request.timeout)
        sent: dict[str, Any] = {"data": _form(body)} if request.form else {"json": body}
        url = f"{self.base}/api/v1/task"
        async with self.session.post(url, headers=headers | dict(request.headers), **sent) as answer:
            outcome = _rest_outcome(answer)
            if answer.content_type == "text/event-stream":
                assert answer.status == 200
                await self._read_stream(await answer.text(), outcome)
            elif answer.content_type != "application/json":
                outcome.output["inline"] = digest(await answer.read())
            elif answer.status == 200:
                await self._read_result(await answer.json(), outcome)
            else:
                _read_rest_error(await answer.json(), outcome)
        return outcome

    async def get(self, path: str, key: str, **headers: str) -> Outcome:
        """Gets a path; the outcome has no output."""
        headers["Authorization"] = f"Bearer {key}"
        async with self.session.get(self.base + path, headers=headers) as answer:
            outcome = _rest_outcome(answer)
            if answer.content_type == "application/json" and answer.status >= 400:
                _read_rest_error(await answer.json(), outcome)
        return outcome

    async def _read_stream(self, text: str, outcome: Outcome) -> None:
        audio, common = [], None
        for block in text.split("\n\n"):
            lines = [line for line in block.split("\n") if line and not line.startswith(":")]
            if not lines:
                continue
            assert not outcome.done, "an event after [DONE]"
            if lines[0] == "event: error":
                _read_rest_error(json.loads(lines[1].removeprefix("data: ")), outcome)
                continue
            assert outcome.code == "ok", "an event after an error"
            (line,) = lines
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                outcome.done = True
                continue
            chunk = json.loads(data)
            assert common in (None, [chunk["id"], chunk["created"], chunk["model"]])
            common = [chunk["id"], chunk["created"], chunk["model"]]
            outcome.id, name = chunk["id"], chunk["object"]
            assert outcome.id.startswith(
                {"task": "task_", "image": "img_"}.get(name.split(".")[0], "speech_")
            )
            if name == "task.completion.chunk":
                (choice,) = chunk["choices"]
                delta = choice["delta"]
                if "content" in delta or choice["finish_reason"]:
                    outcome.output["text"] = outcome.output.get("text", "") + delta.get("content", "")
                for call in delta.get("tool_calls", []):
                    function = call["function"]
                    assert call.get("type", "function") == "function"
                    first = call.get("id", ""), function.get("name", "")
                    add_call_piece(outcome, call["index"], *first, function["arguments"])
                if choice["finish_reason"]:
                    outcome.output["finish"] = choice["finish_reason"]
                    outcome.output["usage"] = _token_counts(chunk["usage"])
            elif name == "speech.generation.chunk":
                audio.append(base64.b64decode(chunk["audio"]["b64_json"]))
                outcome.output["audio"] = digest(b"".join(audio))
            elif name == "image.progress":
                outcome.output.setdefault("progress", []).append(chunk["progress"])
            else:
                await self._read_result(chunk, outcome)
        assert outcome.done == (outcome.code == "ok"), (
            "a stream ends with [DONE] if and only if it is complete"
        )

    async def _read_result(self, result: dict[str, Any], outcome: Outcome) -> None:
        output = outcome.output
        outcome.id, output["model"] = result["id"], result["model"]
        assert isinstance(result["created"], int)
        match result["object"]:
            case "task.completion":
                assert set(result) == {"id", "object", "created", "model", "choices", "usage"}
                (choice,) = result["choices"]
                assert choice["index"] == 0
                assert choice["message"]["role"] == "assistant"
                output |= {"text": choice["message"]["content"] or "", "finish": choice["finish_reason"]}
                output["usage"] = _token_counts(result["usage"])
                if "tool_calls" in choice["message"]:
                    output["calls"] = [
                        [call["id"], call["function"]["name"], call["function"]["arguments"]]
                        for call in choice["message"]["tool_calls"]
                    ]
            case "image.generation":
                assert set(result) == {"id", "object", "created", "model", "data"}
                (media,) = result["data"]
                await self._read_media(media, outcome)
            case "speech.generation":
                assert set(result) == {"id", "object", "created", "model", "audio"}
                await self._read_media(result["audio"], outcome)
            case name:
                assert name == "speech.transcription"
                output |= {"text": result["text"], "language": result["language"]}
                output["words"] = [
                    word | {"start": round(word["start"], 6), "end": round(word["end"], 6)}
                    for word in result["words"]
                ]

    async def _read_media(self, media: dict[str, Any], outcome: Outcome) -> None:
        if "b64_json" in media:
            outcome.output["inline"] = digest(base64.b64decode(media["b64_json"]))
        if "url" in media:
            assert media["url"].startswith(self.base + "/media/"), (
                "a link leads to the gateway that returned it"
            )
            async with self.session.get(media["url"]) as answer:
                data = await answer.read()
                assert answer.status == 200, data
                add_link(outcome, media["url"], data, answer.headers["Content-Type"])


def _token_counts(usage: Mapping[str, Any]) -> list[int]:
    return [usage[f"{name}_tokens"] for name in ("prompt", "completion", "total")]


def _rest_outcome(answer: aiohttp.ClientResponse) -> Outcome:
    outcome = Outcome(status=answer.status, headers={k.lower(): v for k, v in answer.headers.items()})
    if "retry-after" in outcome.headers:
        outcome.retry_after = int(outcome.headers["retry-after"])
    return outcome


def _read_rest_error(body: dict[str, Any], outcome: Outcome) -> None:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "code"}
    outcome.code, outcome.message = body["error"]["code"], body["error"]["message"]


def _form(body: Mapping[str, Any]) -> aiohttp.FormData:
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in body.items():
        if name == "audio":
            form.add_field(name, base64.b64decode(value), filename="a.bin", content_type="audio/mpeg")
        else:
            form.add_field(name, value if isinstance(value, str) else json.dumps(value))
    return form
