"""A house of a test's own, with its plans, before vendors that are played; and callers who come in three ways."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from pomelo.accounts.plans import Plan
from pomelo.app import App, open_app, open_gateway
from pomelo.engine.circuit_breaker import CircuitBreaker
from pomelo.engine.routing import Router
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.providers.base import Provider
from pomelo.settings import Settings
from pomelo.stores.accounts import Balance, Grant, Wallet
from pomelo.stores.base import Store
from pomelo.stores.usage import UsageQuery, UsageRecord
from pomelo.testing import FaultUpstream
from tests.integration.asking import reason_of
from tests.parity.clients import to_task

WAYS = ("grpc", "rest", "remote")
RICH = 10**12
"""Microcredits that no test spends."""

PLANS = {
    plan.name: plan
    for plan in (
        Plan("unlimited"),
        Plan("five", requests=5),
        Plan("wide", requests=10_000, concurrent=2, tokens=1_000),
        Plan("all", requests=1_000, concurrent=50, tokens=100_000),
        Plan("two hundred", requests=200, concurrent=10),
        Plan("pictures", models=frozenset({"flux-1-pro", "flux-1-dev"})),
    )
}
SOUND = b"RIFF\x24\x00\x00\x00WAVE" + b"sound " * 2000
KINDS: dict[str, dict[str, Any]] = {
    "text": {"model": "gpt-4", "messages": [{"role": "user", "content": "Hello there, world"}]},
    "image": {"model": "flux-1-pro", "prompt": "A kite", "width": 96, "height": 64},
    "tts": {"model": "eleven-labs-tts", "text": "Good morning to you.", "voice": "adam"},
    "sts": {
        "model": "eleven-labs-sts",
        "audio": base64.b64encode(b"some sound " * 400).decode(),
        "voice": "adam",
    },
    "stt": {"model": "eleven-labs-stt", "audio": base64.b64encode(b"some sound " * 400).decode()},
}
"""A small task of each kind."""

_numbers = itertools.count(1)


def say(text: str = "Hello there", model: str = "gpt-4", **more: Any) -> dict[str, Any]:
    """A text task of one message."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


@dataclass
class Told:
    """What came back. Names of headers are in lower case; `content` is the text, or a digest of the bytes."""

    code: str = "ok"
    message: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    trailer: dict[str, str] = field(default_factory=dict)
    id: str = ""
    content: str = ""
    usage: tuple[int, ...] = ()
    done: bool = False
    """Whether it was a stream that came to its end."""
    links: tuple[str, ...] = ()
    adjustments: tuple[str, ...] = ()
    """As gRPC messages have them, in the header's form."""

    @property
    def last(self) -> dict[str, str]:
        """What the headers and the end tell together."""
        return self.headers | self.trailer


@dataclass(frozen=True)
class Caller:
    """An account and its keys."""

    account: str
    test: str
    live: str


@dataclass
class House:
    """A running app, a gateway before it, and the played vendors."""

    app: App
    upstream: FaultUpstream
    session: aiohttp.ClientSession
    channel: grpc.aio.Channel
    urls: Mapping[str, str]

    async def caller(
        self, plan: str = "unlimited", test: int = RICH, live: int = RICH, models: tuple[str, ...] = ()
    ) -> Caller:
        """A new account with so many microcredits, and its keys."""
        name = f"account-{next(_numbers)}"
        store = self.app.store
        await store.add_account(name, plan, time.time())
        for is_live, amount in ((False, test), (True, live)):
            if amount:
                await store.grant(Grant(f"{name} {is_live}", Wallet(name, is_live), amount, time.time()))
        keys = [(await self.app.keyring.create(name, live=how, models=models))[1] for how in (False, True)]
        return Caller(name, *keys)

    async def records(self, caller: Caller, **more: Any) -> list[UsageRecord]:
        """An account's records, newest first."""
        found, _ = await self.app.store.list_usage(UsageQuery(account=caller.account, **more), limit=1000)
        return found

    async def balance(self, caller: Caller, *, live: bool = False) -> Balance:
        """A side of an account."""
        return await self.app.store.balance(Wallet(caller.account, live))

    async def slots(self, caller: Caller, *, live: bool = False) -> int:
        """How many tasks of a side run."""
        return (await self.app.store.limit_status(Wallet(caller.account, live))).concurrency

    # --- asking

    async def ask(
        self,
        way: str,
        key: str,
        body: Mapping[str, Any],
        *,
        stream: bool = False,
        accept: str | None = None,
        form: bool = False,
        within: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Told:
        """One task, to its end."""
        if way == "grpc":
            return await self._grpc(key, body, stream, within, headers or {})
        given = {"Authorization": f"Bearer {key}", **(headers or {})}
        if accept:
            given["Accept"] = accept
        if within is not None:
            given["X-Request-Timeout"] = str(within)
        whole = {**body, "stream": True} if stream else dict(body)
        sent: dict[str, Any] = {"data": _form(whole)} if form else {"json": whole}
        async with self.session.post(f"{self.urls[way]}/api/v1/task", headers=given, **sent) as answer:
            told = Told(status=answer.status, headers={k.lower(): v for k, v in answer.headers.items()})
            if answer.content_type == "text/event-stream":
                await self._events(await answer.text(), told)
            elif answer.content_type == "application/json":
                await self._json(await answer.json(), told)
            else:
                told.content = digest(await answer.read())
        return told

    async def _grpc(
        self,
        key: str,
        body: Mapping[str, Any],
        stream: bool,
        within: float | None,
        headers: Mapping[str, str],
    ) -> Told:
        tasks = TaskServiceStub(self.channel)
        metadata = [("authorization", f"Bearer {key}"), *((k.lower(), v) for k, v in headers.items())]
        task = to_task(body, stream=stream)
        told = Told()
        if stream:
            call = tasks.StreamTask(StreamTaskRequest(task=task), metadata=metadata, timeout=within)
        else:
            call = tasks.RunTask(RunTaskRequest(task=task), metadata=metadata, timeout=within)
        try:
            if stream:
                await self._messages(call, told)
            else:
                await self._result((await call).result, told)
        except grpc.aio.AioRpcError as error:
            told.code, told.message = reason_of(error) or error.code().name.lower(), error.details() or ""
        told.trailer = _plain(await call.trailing_metadata())
        told.headers = _plain(await call.initial_metadata()) or told.trailer
        return told

    async def _messages(self, call: Any, told: Told) -> None:
        sound = []
        async for event in call:
            which = event.WhichOneof("event")
            if which == "started":
                told.id = event.started.id
                told.adjustments = _adjustments(event.started)
            elif which == "text_delta":
                told.content += event.text_delta.content
                if event.text_delta.finish_reason:
                    told.usage = _usage(event.text_delta.usage)
            elif which == "audio_chunk":
                sound.append(event.audio_chunk.data)
            elif which == "result":
                await self._result(event.result, told)
        if sound:
            told.content = digest(b"".join(sound))
        told.done = True

    async def _result(self, result: Any, told: Told) -> None:
        told.id = result.id
        told.adjustments = _adjustments(result)
        which = result.WhichOneof("output")
        if which == "text":
            told.content, told.usage = result.text.content, _usage(result.text.usage)
        elif which == "transcription":
            told.content = result.transcription.text
        elif which is not None:
            part = result.speech if which == "speech" else result.image.images[0]
            data = part.data
            if part.media.media_id:
                told.links = (part.media.url,)
                request = DownloadMediaRequest(
                    media_id=part.media.media_id, signature=part.media.url.partition("?")[2]
                )
                got = [m.chunk async for m in MediaServiceStub(self.channel).DownloadMedia(request)]
                assert not data or data == b"".join(got)
                data = b"".join(got)
            told.content = digest(data)

    async def _events(self, text: str, told: Told) -> None:
        sound = []
        for block in text.split("\n\n"):
            lines = [line for line in block.split("\n") if line and not line.startswith(":")]
            if not lines:
                continue
            assert not told.done
            if lines[0] == "event: error":
                await self._json(json.loads(lines[1].removeprefix("data: ")), told)
            elif lines[0] == "data: [DONE]":
                told.done = True
            else:
                chunk = json.loads(lines[0].removeprefix("data: "))
                told.id = chunk["id"]
                if chunk["object"] == "task.completion.chunk":
                    told.content += chunk["choices"][0]["delta"].get("content", "")
                    if "usage" in chunk:
                        told.usage = tuple(chunk["usage"].values())
                elif chunk["object"] == "speech.generation.chunk":
                    sound.append(base64.b64decode(chunk["audio"]["b64_json"]))
                elif chunk["object"] != "image.progress":
                    await self._json(chunk, told)
        if sound:
            told.content = digest(b"".join(sound))

    async def _json(self, found: dict[str, Any], told: Told) -> None:
        if "error" in found:
            told.code, told.message = found["error"]["code"], found["error"]["message"]
            return
        told.id = found["id"]
        if "choices" in found:
            told.content = found["choices"][0]["message"]["content"]
            told.usage = tuple(found["usage"].values())
        elif "text" in found:
            told.content = found["text"]
        else:
            medium = found["audio"] if "audio" in found else found["data"][0]
            data = base64.b64decode(medium.get("b64_json", ""))
            if "url" in medium:
                told.links = (medium["url"],)
                async with self.session.get(medium["url"]) as answer:
                    got = await answer.read()
                    assert answer.status == 200, got
                assert not data or data == got
                data = got
            told.content = digest(data)

    async def get(self, way: str, key: str, path: str, **headers: str) -> Told:
        """A GET of REST; over gRPC the list of models, whatever the path."""
        if way == "grpc":
            call = ModelServiceStub(self.channel).ListModels(
                ListModelsRequest(), metadata=[("authorization", f"Bearer {key}")]
            )
            await call
            return Told(headers=_plain(await call.trailing_metadata()))
        given = {"Authorization": f"Bearer {key}"} | headers
        async with self.session.get(self.urls[way] + path, headers=given) as answer:
            told = Told(status=answer.status, headers={k.lower(): v for k, v in answer.headers.items()})
            if answer.content_type == "application/json" and answer.status >= 400:
                await self._json(await answer.json(), told)
            return told


def digest(data: bytes) -> str:
    """A short name for bytes; empty for none."""
    return f"{len(data)} {hashlib.sha256(data).hexdigest()[:16]}" if data else ""


def _plain(metadata: Any) -> dict[str, str]:
    return {str(k): str(v) for k, v in metadata or () if not str(k).endswith("-bin")}


def _adjustments(message: Any) -> tuple[str, ...]:
    return tuple(
        f"{made.field}={made.used}" if made.kind == made.KIND_CLAMPED else made.field
        for made in message.adjustments
    )


def _usage(usage: Any) -> tuple[int, ...]:
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def _form(body: dict[str, Any]) -> aiohttp.FormData:
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in body.items():
        if name == "audio":
            form.add_field(name, base64.b64decode(value), filename="a.bin", content_type="audio/mpeg")
        else:
            form.add_field(name, value if isinstance(value, str) else json.dumps(value))
    return form


PATIENT = partial(Router, breaker=partial(CircuitBreaker, minimum_calls=10**9))
"""Makes a router that asks its routes however often they failed."""


@asynccontextmanager
async def open_house(
    folder: Path,
    *,
    plans: Mapping[str, Plan] = PLANS,
    wrap_store: Callable[[Store], Store] = lambda store: store,
    make_router: Callable[[Mapping[str, Provider]], Router] = PATIENT,
    upstream_connections: int = 256,
    settings: Mapping[str, Any] | None = None,
    gateway_settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> AsyncIterator[House]:
    """A house on free ports, with a live key of every vendor but Anthropic. `settings` are added to its own or
    replace them; `gateway_settings` are those of the remote gateway."""
    async with FaultUpstream() as upstream:
        given: dict[str, Any] = {
            "rest": "127.0.0.1:0",
            "grpc": "127.0.0.1:0",
            "data": folder / "data",
            "openai_api_key": "sk-x",
            "openai_base_url": upstream.openai_base_url,
            "anthropic_base_url": upstream.anthropic_base_url,
            "mistral_api_key": "m-x",
            "mistral_base_url": upstream.mistral_base_url,
            "bfl_api_key": "b-x",
            "bfl_base_url": upstream.bfl_base_url,
            "together_api_key": "t-x",
            "together_base_url": upstream.together_base_url,
            "elevenlabs_api_key": "e-x",
            "elevenlabs_base_url": upstream.elevenlabs_base_url,
            "upstream_connections": upstream_connections,
            "grace": 1.0,
        }
        opened = Settings(**{**given, **(settings or {})})
        async with (
            open_app(opened, plans=plans, make_router=make_router, wrap_store=wrap_store, **more) as app,
            aiohttp.ClientSession() as session,
        ):
            assert app.rest is not None
            assert app.grpc is not None
            secret = opened.root_secret().decode()
            away = Settings(
                rest="127.0.0.1:0",
                data=folder / "gateway",
                secret=secret,
                grace=1.0,
                **(gateway_settings or {}),
            )
            async with (
                open_gateway(away, app.grpc) as (host, port),
                grpc.aio.insecure_channel(
                    app.grpc, options=[("grpc.max_receive_message_length", 2**26)]
                ) as channel,
            ):
                urls = {"rest": "http://{}:{}".format(*app.rest), "remote": f"http://{host}:{port}"}
                yield House(app, upstream, session, channel, urls)
