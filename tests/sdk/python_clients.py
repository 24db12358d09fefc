"""The Python clients of OpenAI's API: one method for each feature of the matrix, which returns what it got."""

from __future__ import annotations

import base64
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import anyio
import openai
import pytest
from pydantic import BaseModel, SecretStr

from tests.sdk.sdk import WEATHER

if TYPE_CHECKING:
    from langchain_openai import ChatOpenAI

Act = Callable[[], Awaitable[None]]

HELLO = "Hello there"
WEATHER_QUESTION = "How is the weather?"
RESULT = "Sunny"
TOOLS: Any = [{"type": "function", "function": WEATHER}]
IMAGE: dict[str, Any] = {"prompt": "A kite", "size": "256x288"}
ALLOWED: dict[str, Any] = {"allowed_openai_params": ["response_format"]}
"""LiteLLM has a table of what OpenAI's own gpt-4 could not do."""
TTS, STT = "eleven-labs-tts", "eleven-labs-stt"


def tool_result(call: Any, streamed: Any, last: Any) -> dict[str, Any]:
    """What the check of tools returns, from a call, the streamed message of the same question, and the answer
    to the call's result."""
    return {
        "name": call.function.name,
        "arguments": sorted(json.loads(call.function.arguments)),
        "streamed": sorted(json.loads(streamed.tool_calls[0].function.arguments)),
        "answer": last.choices[0].message.content,
    }


class Forecast(BaseModel):
    """What a model is to answer."""

    city: str
    sky: Literal["clear", "cloudy"]


class Target(BaseModel):
    """Where a client is tested: a server, a key, and what the checks need. The programs for Node.js read the same
    members."""

    name: str
    url: str
    """With /v1."""
    key: str
    text: str
    """What is spoken."""
    audio: str
    """An MP3 in base64."""
    pixel: str
    """A PNG in base64."""
    failures: dict[str, dict[str, Any]]
    """The tasks that fail, by a name: `key`, `prompt`, `temperature`, and `stream`, where they differ."""
    retry_key: str
    retry_prompt: str
    control: str
    """Posting to `/hold` there takes the only concurrent task that `retry_key` has, `/release` returns it."""


def messages(content: Any, *before: Any) -> list[Any]:
    return [*before, {"role": "user", "content": content}]


def seen(pixel: str, question: str) -> list[Any]:
    """Returns a message with an image."""
    url = f"data:image/png;base64,{pixel}"
    return messages([{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}])


def described(error: BaseException) -> list[Any]:
    """Returns the class, the status and the code of an error."""
    return [type(error).__name__, getattr(error, "status_code", None), getattr(error, "code", None)]


@asynccontextmanager
async def instead_of_waiting(act: Act) -> AsyncIterator[list[float]]:
    """Records the seconds that OpenAI's SDK would wait before each retry; `act` is done in place of the wait."""
    waits: list[float] = []

    async def record(seconds: float) -> None:
        waits.append(seconds)
        await act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anyio, "sleep", record)
        yield waits


class PythonClient(ABC):
    """A client with a target. `hold` and `release` are those of the target's account for retries."""

    def __init__(self, target: Target, hold: Act, release: Act) -> None:
        self.target = target
        self._hold, self._release = hold, release

    async def aclose(self) -> None:
        """Closes the connections of the client, if it has some of its own."""
        return

    @abstractmethod
    async def ask(
        self, prompt: str, *, key: str = "", retries: int = 0, temperature: float | None = None
    ) -> str:
        """Returns the answer to a prompt."""

    @abstractmethod
    def read(self, prompt: str) -> AsyncIterator[str]:
        """Yields the texts of a streamed answer."""

    async def stream(self) -> dict[str, Any]:
        return {"whole": await self.ask(HELLO), "text": "".join([text async for text in self.read(HELLO)])}

    async def errors(self) -> dict[str, Any]:
        found = {}
        for name, failure in self.target.failures.items():
            options = dict(failure)
            try:
                if options.pop("stream", False):
                    async for _ in self.read(options["prompt"]):
                        pass
                else:
                    await self.ask(options.pop("prompt", HELLO), **options)
                found[name] = ["no error", None, None]
            except Exception as error:
                found[name] = described(error)
        return found

    async def retries(self) -> dict[str, Any]:
        await self._hold()
        async with instead_of_waiting(self._release) as waits:
            text = await self.ask(self.target.retry_prompt, key=self.target.retry_key, retries=2)
        return {"waits": waits, "text": text}


class OpenAi(PythonClient):
    """OpenAI's own SDK."""

    def __init__(self, target: Target, hold: Act, release: Act) -> None:
        super().__init__(target, hold, release)
        self._client = openai.AsyncOpenAI(base_url=target.url, api_key=target.key, max_retries=0)

    async def aclose(self) -> None:
        await self._client.close()

    async def ask(
        self, prompt: str, *, key: str = "", retries: int = 0, temperature: float | None = None
    ) -> str:
        client = self._client.with_options(api_key=key or self.target.key, max_retries=retries)
        answer = await client.chat.completions.create(
            model="gpt-4", messages=messages(prompt), temperature=temperature
        )
        return answer.choices[0].message.content or ""

    async def read(self, prompt: str) -> AsyncIterator[str]:
        async for chunk in await self._client.chat.completions.create(
            model="gpt-4", messages=messages(prompt), stream=True
        ):
            yield chunk.choices[0].delta.content or ""

    async def chat(self) -> dict[str, Any]:
        answer = await self._client.chat.completions.create(model="gpt-4", messages=messages(HELLO))
        assert answer.usage is not None
        return {"text": answer.choices[0].message.content, "tokens": answer.usage.total_tokens}

    async def responses(self) -> dict[str, Any]:
        whole = await self._client.responses.create(model="gpt-4", input=HELLO)
        async with self._client.responses.stream(model="gpt-4", input=HELLO) as stream:
            texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        return {"whole": whole.output_text, "text": "".join(texts)}

    async def tools(self) -> dict[str, Any]:
        question = messages(WEATHER_QUESTION)
        create = self._client.chat.completions.create
        first = (await create(model="gpt-4", messages=question, tools=TOOLS)).choices[0].message
        call: Any = (first.tool_calls or [])[0]
        async with self._client.chat.completions.stream(
            model="gpt-4", messages=question, tools=TOOLS
        ) as stream:
            streamed: Any = (await stream.get_final_completion()).choices[0].message
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
        last = await create(model="gpt-4", messages=[*question, cast("Any", first), result], tools=TOOLS)
        return tool_result(call, streamed, last)

    async def schema(self) -> list[str]:
        answer = await self._client.chat.completions.parse(
            model="gpt-4", messages=messages(WEATHER_QUESTION), response_format=Forecast
        )
        parsed = answer.choices[0].message.parsed
        assert parsed is not None
        return sorted(parsed.model_dump())

    async def vision(self, question: str) -> str:
        answer = await self._client.chat.completions.create(
            model="gpt-4", messages=seen(self.target.pixel, question)
        )
        return answer.choices[0].message.content or ""

    async def image(self) -> str:
        made = await self._client.images.generate(model="flux-1-pro", **IMAGE)
        assert made.data is not None
        return base64.b64decode(made.data[0].b64_json or "")[:4].hex()

    async def speech(self) -> str:
        made = await self._client.audio.speech.create(model=TTS, input=self.target.text, voice="alloy")
        head: bytes = made.content[:2]
        return head.hex()

    async def transcription(self) -> str:
        audio = ("speech.mp3", base64.b64decode(self.target.audio))
        return str((await self._client.audio.transcriptions.create(model=STT, file=audio)).text)

    async def models(self) -> list[str]:
        return [model.id async for model in self._client.models.list()]


class LangChain(PythonClient):
    """LangChain's ChatOpenAI."""

    def _model(self, *, key: str = "", retries: int = 0, **options: Any) -> ChatOpenAI:
        from langchain_openai import ChatOpenAI  # a second, so only where it is used

        return ChatOpenAI(
            model="gpt-4",
            base_url=self.target.url,
            api_key=SecretStr(key or self.target.key),
            max_retries=retries,
            **options,
        )

    async def ask(
        self, prompt: str, *, key: str = "", retries: int = 0, temperature: float | None = None
    ) -> str:
        answer = await self._model(key=key, retries=retries, temperature=temperature).ainvoke(prompt)
        return str(answer.text)

    async def read(self, prompt: str) -> AsyncIterator[str]:
        async for chunk in self._model().astream(prompt):
            yield chunk.text

    async def chat(self) -> dict[str, Any]:
        answer = await self._model().ainvoke(HELLO)
        assert answer.usage_metadata is not None
        return {"text": answer.text, "tokens": answer.usage_metadata["total_tokens"]}

    async def responses(self) -> dict[str, Any]:
        model = self._model(use_responses_api=True)
        whole = await model.ainvoke(HELLO)
        return {"whole": whole.text, "text": "".join([chunk.text async for chunk in model.astream(HELLO)])}

    async def tools(self) -> dict[str, Any]:
        from langchain_core.messages import ToolMessage

        model = self._model().bind_tools(TOOLS)
        answer = await model.ainvoke(WEATHER_QUESTION)
        streamed: Any = None
        async for chunk in model.astream(WEATHER_QUESTION):
            streamed = chunk if streamed is None else streamed + chunk
        (call,) = answer.tool_calls
        result = ToolMessage(RESULT, tool_call_id=call["id"])
        last = await model.ainvoke([("human", WEATHER_QUESTION), answer, result])
        return {
            "name": call["name"],
            "arguments": sorted(call["args"]),
            "streamed": sorted(streamed.tool_calls[0]["args"]),
            "answer": last.text,
        }

    async def schema(self) -> list[str]:
        forecast = await self._model().with_structured_output(Forecast).ainvoke(WEATHER_QUESTION)
        assert isinstance(forecast, Forecast)
        return sorted(forecast.model_dump())

    async def vision(self, question: str) -> str:
        return str((await self._model().ainvoke(seen(self.target.pixel, question))).text)


class LiteLlm(PythonClient):
    """LiteLLM's SDK."""

    def __init__(self, target: Target, hold: Act, release: Act) -> None:
        super().__init__(target, hold, release)
        import litellm  # a second, so only where it is used

        self._litellm: Any = litellm

    def _options(self, *, key: str = "", retries: int = 0, model: str = "gpt-4") -> dict[str, Any]:
        return {
            "model": f"openai/{model}",
            "api_base": self.target.url,
            "api_key": key or self.target.key,
            "max_retries": retries,
        }

    async def _ask(self, asked: list[Any], **options: Any) -> Any:
        return await self._litellm.acompletion(messages=asked, **{**self._options(), **options})

    async def ask(
        self, prompt: str, *, key: str = "", retries: int = 0, temperature: float | None = None
    ) -> str:
        options = self._options(key=key, retries=retries)
        answer = await self._ask(messages(prompt), temperature=temperature, **options)
        return str(answer.choices[0].message.content)

    async def read(self, prompt: str) -> AsyncIterator[str]:
        async for chunk in await self._ask(messages(prompt), stream=True):
            yield chunk.choices[0].delta.content or ""

    async def chat(self) -> dict[str, Any]:
        answer = await self._ask(messages(HELLO))
        return {"text": answer.choices[0].message.content, "tokens": answer.usage.total_tokens}

    async def responses(self) -> dict[str, Any]:
        whole = await self._litellm.aresponses(input=HELLO, **self._options())
        stream = await self._litellm.aresponses(input=HELLO, stream=True, **self._options())
        texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        return {"whole": whole.output_text, "text": "".join(texts)}

    async def tools(self) -> dict[str, Any]:
        question = messages(WEATHER_QUESTION)
        first = (await self._ask(question, tools=TOOLS)).choices[0].message
        chunks = [chunk async for chunk in await self._ask(question, tools=TOOLS, stream=True)]
        streamed = self._litellm.stream_chunk_builder(chunks, messages=question).choices[0].message
        (call,) = first.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
        last = await self._ask([*question, first, result], tools=TOOLS)
        return tool_result(call, streamed, last)

    async def schema(self) -> list[str]:
        answer = await self._ask(messages(WEATHER_QUESTION), response_format=Forecast, **ALLOWED)
        return sorted(Forecast.model_validate_json(answer.choices[0].message.content).model_dump())

    async def vision(self, question: str) -> str:
        answer = await self._ask(seen(self.target.pixel, question))
        return str(answer.choices[0].message.content)

    async def image(self) -> str:
        made = await self._litellm.aimage_generation(**IMAGE, **self._options(model="flux-1-pro"))
        return base64.b64decode(made.data[0].b64_json)[:4].hex()

    async def speech(self) -> str:
        made = await self._litellm.aspeech(input=self.target.text, voice="alloy", **self._options(model=TTS))
        return str(made.content[:2].hex())

    async def transcription(self) -> str:
        audio = ("speech.mp3", base64.b64decode(self.target.audio))
        made = await self._litellm.atranscription(file=audio, **self._options(model=STT))
        return str(made.text)

    async def models(self) -> list[str]:
        return list(
            await anyio.to_thread.run_sync(
                lambda: self._litellm.get_valid_models(
                    check_provider_endpoint=True,
                    custom_llm_provider="openai",
                    api_key=self.target.key,
                    api_base=self.target.url,
                )
            )
        )


PYTHON_CLIENTS: dict[str, type[PythonClient]] = {
    "python": OpenAi,
    "langchain": LangChain,
    "litellm": LiteLlm,
}
"""The classes by the name of the client in the matrix."""
