"""A vendor outside of Pomelo: its protocol, a correct provider, and faulty providers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from yarl import URL

from pomelo.catalog.catalog import Route
from pomelo.errors import PomeloError
from pomelo.gen.v1.text_pb2 import FinishReason, TextDelta
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers import Credentials
from pomelo.providers.base import Event, Job
from pomelo.providers.http.client import Http
from pomelo.providers.http.errors import ErrorBody, ErrorMapping, malformed_response
from pomelo.providers.text import completed_text
from pomelo.testing import Received, Reply, VendorFaults, VendorProtocol, plain_refusal
from pomelo.testing.suite import Subject, sample

WORDS = ("Hello", " from", " Acme", ".")


def answer(received: Received, *, end: bool = True, count: Any = (3, 4)) -> Reply:
    """Acme's response: a line of JSON for each word, or the whole text."""
    last = {"words": count, "end": end}
    if not received.body["stream"]:
        body = json.dumps({"said": "".join(WORDS), **last}).encode()
        return Reply(headers={"Content-Type": "application/json"}, steps=(body,))
    lines = [{"said": word} for word in WORDS] + ([last] if end else [])
    steps = tuple(f"data: {json.dumps(line)}\n\n".encode() for line in lines)
    return Reply(headers={"Content-Type": "text/event-stream"}, steps=steps)


def refused(received: Received, api_key: str | None) -> Reply | None:
    """Acme checks only the key."""
    if "acme-key" not in received.headers:
        return plain_refusal(401, "Who are you?")
    return None


PROTOCOL = VendorProtocol(
    "acme",
    lambda received: received.path == "/acme/say",
    refused,
    answer,
    faults={
        "text": VendorFaults(
            {
                "no end marker": lambda received: answer(received, end=False),
                "no usage": lambda received: answer(received, count=None),
                "out of money": plain_refusal(402, "Pay first"),
            },
            {"against the policy": "Acme says everything"},
        )
    },
)


class Acme:
    """A correct provider; each class below breaks one rule."""

    count_needed = True

    def __init__(self, credentials: Credentials, http: Http) -> None:
        self.key = credentials.api_key or ""
        self.configured = bool(self.key)
        self.http = http
        self.url = URL(credentials.base_url + "/say")
        self.error_mapping = ErrorMapping("acme", lambda body: ErrorBody())

    async def aclose(self) -> None:
        """Nothing to free."""

    def asked(self, job: Job[Any]) -> tuple[URL, dict[str, str], bytes, ErrorMapping]:
        """The request."""
        body = {"text": job.input.messages[-1].content[0].text, "stream": job.stream}
        headers = {"acme-key": self.key, "Content-Type": "application/json"}
        return self.url, headers, json.dumps(body).encode(), self.error_mapping

    async def text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        """Answers."""
        if not job.stream:
            response = await self.http.request_json(*self.asked(job))
            yield self.last(response, response.get("said") if isinstance(response, dict) else None)
            return
        async with self.http.stream_events(*self.asked(job)) as stream:
            while events := await stream.read():
                for _, data in events:
                    line = self.line(data)
                    if "end" in line:
                        yield self.last(line, "")
                        return
                    yield Event(text_delta=TextDelta(text=line["said"]))
        raise malformed_response("no end")

    def line(self, data: bytes) -> dict[str, Any]:
        """A line of a stream."""
        try:
            line = json.loads(data)
            if isinstance(line["said"] if "end" not in line else "", str):
                return dict(line)
        except (KeyError, TypeError, ValueError):
            pass
        raise malformed_response("no line")

    def last(self, response: Any, content: Any) -> Event:
        """The last event; without usage if the vendor reports none."""
        try:
            words = response["words"]
            if isinstance(content, str):
                usage = words and Usage(input_tokens=words[0], output_tokens=words[1])
                return completed_text(content, FinishReason.FINISH_REASON_STOP, usage)
        except (KeyError, TypeError, ValueError):
            pass
        raise malformed_response("no answer")


class SwallowsCuts(Acme):
    """Treats a truncated stream as complete."""

    async def text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        try:
            async with aclosing(super().text(job)) as events:
                async for event in events:
                    yield event
        except PomeloError:
            yield self.last({"words": (1, 1)}, "")


class ForgetsTheEndMarker(Acme):
    """Takes the end of a stream for its end marker."""

    async def text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        if not job.stream:
            async for event in super().text(job):
                yield event
            return
        async with self.http.stream_events(*self.asked(job)) as stream:
            while events := await stream.read():
                for _, data in events:
                    line = self.line(data)
                    if "end" not in line:
                        yield Event(text_delta=TextDelta(text=line["said"]))
        yield self.last({"words": (1, 1)}, "")


class LeaksAConnection(Acme):
    """Opens an answer and never closes it."""

    def __init__(self, credentials: Credentials, http: Http) -> None:
        super().__init__(credentials, http)
        self.open: list[Any] = []

    async def text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        context = self.http.stream_events(*self.asked(job))
        self.open.append(context)
        stream = await context.__aenter__()
        while events := await stream.read():
            for _, data in events:
                line = self.line(data)
                if "end" in line:
                    yield self.last(line, "")
                    return
                yield Event(text_delta=TextDelta(text=line["said"]))
        raise malformed_response("no end")


class ShowsTheKey(Acme):
    """Says in an error which key was refused."""

    async def text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        try:
            async with aclosing(super().text(job)) as events:
                async for event in events:
                    yield event
        except PomeloError as error:
            raise PomeloError(error.code, f"Acme does not like {self.key}") from None


class ShowsThePromptInTheContext(Acme):
    """Raises an error while handling another error that contains the prompt."""

    async def text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        try:
            async with aclosing(super().text(job)) as events:
                async for event in events:
                    yield event
        except PomeloError as error:
            try:
                raise ValueError(job.input.messages[-1].content[0].text)
            except ValueError:
                raise PomeloError(error.code) from None


class RaisesAnything(Acme):
    """Reads what comes without a look at it."""

    def line(self, data: bytes) -> dict[str, Any]:
        line: dict[str, Any] = json.loads(data)
        return line


class LeavesATask(Acme):
    """Starts an asyncio task and never ends it."""

    def text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        self.task = asyncio.create_task(asyncio.sleep(3))
        return super().text(job)


class WaitsAgain(Acme):
    """Asks again where the vendor is silent, as if the caller had all the time."""

    async def text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        for retry in range(4):
            try:
                async with aclosing(super().text(job)) as events:
                    async for event in events:
                        yield event
                return
            except PomeloError as error:
                if error.code != "deadline_exceeded" or retry == 3:
                    raise


class AnswersInPieces(Acme):
    """Gives a whole answer in two events."""

    async def text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        async with aclosing(super().text(job)) as events:
            async for event in events:
                if not job.stream:
                    message = event.completed.text.message
                    yield Event(text_delta=TextDelta(text=message.content[0].text))
                    event.completed.text.ClearField("message")
                yield event


class GoesOn(Acme):
    """Yields something behind the last event."""

    async def text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        async with aclosing(super().text(job)) as events:
            async for event in events:
                yield event
        yield Event(text_delta=TextDelta(text="And another thing"))


def subject(make: type[Acme]) -> Subject:
    """A provider of Acme's as a subject of the suite."""
    job = sample("text", Route("acme", "acme-large-2"))
    return Subject(make.__name__, make, lambda upstream: upstream.url + "/acme", PROTOCOL, (job,))
