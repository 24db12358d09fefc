"""Sends a task of every type with the client that openapi-python-client has generated, and prints what came."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TypeVar

from pomelo_api.api.account import list_usage
from pomelo_api.api.media import get_media
from pomelo_api.api.models import get_model
from pomelo_api.api.open_ai import (
    create_chat_completion,
    create_image,
    create_response,
    create_speech,
    create_transcription,
)
from pomelo_api.api.tasks import run_task
from pomelo_api.client import AuthenticatedClient
from pomelo_api.models import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionRequest,
    Error,
    Form,
    ImageGeneration,
    ImagePart,
    ImageRequest,
    Images,
    ImageTask,
    ImageUrl,
    JsonSchema,
    JsonSchemaFormat,
    JsonSchemaSchema,
    Model,
    OpenAIError,
    PlainTranscript,
    ResponseRequest,
    SpeechGeneration,
    SpeechRequest,
    SpeechToSpeechTask,
    SpeechToTextTask,
    SpeechTranscription,
    SystemMessage,
    TaskCompletion,
    TaskCompletionChunk,
    TextPart,
    TextResponse,
    TextTask,
    TextToSpeechTask,
    Tool,
    ToolFunction,
    ToolMessage,
    TranscriptionForm,
    UsageList,
    UsageRecord,
    UserMessage,
)
from pomelo_api.types import File, Unset

Expected = TypeVar("Expected")

url, key, image, audio = json.loads(sys.argv[1])
client = AuthenticatedClient(base_url=url, token=key)


def expect(kind: type[Expected], value: object) -> Expected:
    """Returns `value`, which must be a `kind`."""
    assert isinstance(value, kind), value
    return value


text = TextTask(
    model="gpt-4-turbo",
    messages=[
        SystemMessage(role="system", content="Be brief."),
        UserMessage(
            role="user",
            content=[
                TextPart(type_="text", text="What is in this image?"),
                ImagePart(type_="image_url", image_url=ImageUrl(url=image)),
            ],
        ),
    ],
    max_tokens=50,
)
completion = expect(TaskCompletion, run_task.sync(client=client, body=text, idempotency_key="generated"))
assert completion.choices[0].message.content
assert completion.usage.completion_tokens
replayed = run_task.sync_detailed(client=client, body=text, idempotency_key="generated")
assert replayed.headers["Idempotent-Replayed"] == "true"

drawn = run_task.sync(client=client, body=ImageTask(model="flux-1-pro", prompt="A kite", width=64, height=64))
link = expect(ImageGeneration, drawn).data[0].url
assert isinstance(link, str)
assert client.get_httpx_client().get(link).content.startswith(b"\x89PNG")
name = link.rpartition("/")[2].partition("?")[0]
assert expect(File, get_media.sync(name, client=client)).payload.read(4) == b"\x89PNG"

spoken = run_task.sync(client=client, body=TextToSpeechTask(model="eleven-labs-tts", text="Hi", voice="adam"))
said = expect(SpeechGeneration, spoken).audio.b64_json
assert isinstance(said, str)
conversion = SpeechToSpeechTask(model="eleven-labs-sts", audio=said, voice="adam")
assert not isinstance(
    expect(SpeechGeneration, run_task.sync(client=client, body=conversion)).audio.url, Unset
)
heard = run_task.sync(client=client, body=SpeechToTextTask(model="eleven-labs-stt", audio=audio))
assert expect(SpeechTranscription, heard).text
with Path(sys.argv[2]).open("rb") as file:
    form = Form(model="eleven-labs-stt", audio=File(payload=file, file_name="a.wav"), timestamps="none")
    heard = run_task.sync(client=client, body=form)
assert expect(SpeechTranscription, heard).words == []

text.stream = True
chunks = []
with client.get_httpx_client().stream("POST", "/api/v1/task", json=text.to_dict()) as response:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            chunks.append(TaskCompletionChunk.from_dict(json.loads(line[6:])))
assert chunks[-1].choices[0].finish_reason == "stop"
assert not isinstance(chunks[-1].usage, Unset)
assert "".join(str(chunk.choices[0].delta.content or "") for chunk in chunks)

weather = TextTask(
    model="gpt-4-turbo",
    messages=[UserMessage(role="user", content="How is the weather?")],
    tools=[Tool(type_="function", function=ToolFunction(name="get_weather"))],
    tool_choice="required",
)
asked = expect(TaskCompletion, run_task.sync(client=client, body=weather)).choices[0]
assert asked.finish_reason == "tool_calls"
(call,) = expect(list, asked.message.tool_calls)
weather.messages.append(AssistantMessage(role="assistant", tool_calls=[call]))
weather.messages.append(ToolMessage(role="tool", tool_call_id=call.id, content="Sunny."))
answer = expect(TaskCompletion, run_task.sync(client=client, body=weather)).choices[0].message.content
assert "Sunny." in str(answer)

schema = JsonSchemaSchema.from_dict({"type": "object", "required": ["city"]})
city = TextTask(
    model="gpt-4-turbo",
    messages=[UserMessage(role="user", content="Name a city.")],
    response_format=JsonSchemaFormat(type_="json_schema", json_schema=JsonSchema(name="city", schema=schema)),
)
named = expect(TaskCompletion, run_task.sync(client=client, body=city)).choices[0].message.content
assert "city" in json.loads(str(named))

chat = ChatCompletionRequest(model="gpt-4-turbo", messages=[UserMessage(role="user", content="Hi")])
chosen = expect(ChatCompletion, create_chat_completion.sync(client=client, body=chat)).choices[0]
assert chosen.message.content
asked_for = ResponseRequest(model="gpt-4-turbo", input_="Hi")
assert expect(TextResponse, create_response.sync(client=client, body=asked_for)).output
asked_for.temperature = 3
wrong = expect(OpenAIError, create_response.sync(client=client, body=asked_for)).error
assert (wrong.code, wrong.param) == ("invalid_parameter", "temperature")
kite = create_image.sync(client=client, body=ImageRequest(model="flux-1-pro", prompt="A kite", size="64x64"))
assert expect(Images, kite).data[0].url
speech = SpeechRequest(model="eleven-labs-tts", input_="Hi", voice="alloy", response_format="wav")
assert expect(File, create_speech.sync(client=client, body=speech)).payload.read(4) == b"RIFF"
with Path(sys.argv[2]).open("rb") as file:
    upload = TranscriptionForm(model="eleven-labs-stt", file=File(payload=file, file_name="a.wav"))
    assert expect(PlainTranscript, create_transcription.sync(client=client, body=upload)).text

refused = run_task.sync_detailed(client=client, body=TextTask(model="gpt-4", messages=[]))
assert (refused.status_code, expect(Error, refused.parsed).error.code) == (400, "missing_parameter")
assert expect(Model, get_model.sync("gpt-4", client=client)).price.additional_properties
usage = expect(UsageList, list_usage.sync(client=client, page_size=1000))
sys.stdout.write(json.dumps([expect(UsageRecord, record).model for record in usage.data]))
