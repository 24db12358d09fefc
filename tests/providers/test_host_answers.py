"""Answers and errors that hosts of chat completions word in their own ways."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from pomelo.gen.v1.text_pb2 import ReasoningEffort, Role, TextInput
from pomelo.providers.base import VENDOR_CALL, Given, VendorCall
from pomelo.providers.chat.thoughts import MISSING_SIGNATURE, add_placeholders
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.testing import Answer, Received, Reply, chunk
from pomelo.testing.text_answer import DONE
from tests.providers.rig import SECRETS, Rig, check_no_secrets, read_all
from tests.providers.text_rig import (
    COMPATIBLE,
    FILTERED,
    Vendor,
    check_last,
    failure,
    hi,
    message,
    reported_usage,
    text,
)


@pytest.fixture
def vendor() -> Vendor:
    return COMPATIBLE


@pytest.mark.parametrize(
    "reason",
    [
        "error",
        "abort",
        "insufficient_system_resource",
        "network_error",
        "MALFORMED_FUNCTION_CALL",
        "function_call_filter: MALFORMED_FUNCTION_CALL",
        "function_call_filter: UNEXPECTED_TOOL_CALL",
    ],
)
async def test_an_answer_that_the_host_has_not_completed_fails(rig: Rig, reason: str, stream: bool) -> None:
    rig.script(Answer("one two", finish_reason=reason))
    error, begun = await failure(rig.provider, COMPATIBLE.job(stream=stream))
    assert isinstance(error, UpstreamError)
    assert (error.code, error.retry) == ("provider_failed", RetryPolicy.NEVER)
    assert begun == ("one two" if stream else "")


@pytest.mark.parametrize(
    "message", [{}, {"message": None}, {"message": {"role": "assistant"}}, {"delta": {"role": "assistant"}}]
)
async def test_an_answer_that_a_filter_has_withheld_is_filtered(
    rig: Rig, message: dict[str, Any], stream: bool
) -> None:
    """Gemini's, of which the whole answer has no message, and the stream no text."""
    choice = {"index": 0, "finish_reason": "content_filter: PROHIBITED_CONTENT", **message}
    body = {"choices": [choice], "usage": COMPATIBLE.usage(9, 0) | {"total_tokens": 9}}
    event = json.dumps(body | {"object": "chat.completion.chunk"}).encode()
    steps = (b"data: %s\n\n" % event, DONE) if stream else (json.dumps(body).encode(),)
    rig.script(Reply(headers={"Content-Type": "text/event-stream"}, steps=steps))
    answer = await read_all(rig.provider, COMPATIBLE.job(stream=stream))
    assert text(answer) == ""
    check_last(answer, 9, 0, FILTERED)


@pytest.mark.parametrize(
    ("total", "output", "reasoning"),
    [(9 + 7 + 386, 7 + 386, 386), (9 + 7, 7, 0), (9 + 7 + 385, 7, 0), (None, 7, 0), (-1, 7, 0)],
)
async def test_reasoning_that_is_counted_beside_the_output_is_output(
    rig: Rig, total: int | None, output: int, reasoning: int, stream: bool
) -> None:
    """As xAI does: its total of all tokens shows it."""
    details = {"total_tokens": total, "completion_tokens_details": {"reasoning_tokens": 386}}
    rig.script(Answer("Hi", usage=COMPATIBLE.usage(9, 7) | details))
    answer = await read_all(rig.provider, COMPATIBLE.job(stream=stream))
    check_last([answer[-1]], 9, output)
    assert reported_usage(answer).reasoning_tokens == reasoning


@pytest.mark.parametrize(
    ("counts", "output", "reasoning"),
    [
        ({}, 7 + 93, 93),
        ({"completion_tokens": 0}, 100, 100),
        ({"completion_tokens": None}, 100, 100),
        ({"prompt_tokens_details": {"cached_tokens": 4}}, 7 + 93, 93),
        ({"prompt_tokens": 0}, 7, 0),
        ({"total_tokens": 16}, 7, 0),
        ({"total_tokens": 15}, 7, 0),
        ({"total_tokens": "109"}, 7, 0),
        ({"cache_read_input_tokens": 93}, 7, 0),
        ({"prompt_tokens_details": {"cached_tokens": 93}}, 7, 0),
        ({"completion_tokens_details": {"reasoning_tokens": 0}}, 7, 0),
    ],
    ids=str,
)
async def test_thinking_that_is_only_in_the_total_is_output(
    rig: Rig, counts: dict[str, Any], output: int, reasoning: int, stream: bool
) -> None:
    """As Gemini's is. A total with other counts may have been added up in another way."""
    rig.script(Answer("Hi", usage=COMPATIBLE.usage(9, 7) | {"total_tokens": 109} | counts))
    answer = await read_all(rig.provider, COMPATIBLE.job(stream=stream))
    check_last([answer[-1]], counts.get("prompt_tokens", 9), output)
    assert reported_usage(answer).reasoning_tokens == reasoning


async def test_the_counts_of_a_stream_with_thinking_in_each_chunk_are_those_of_the_last(
    rig: Rig,
) -> None:
    """Gemini's, which have all that was counted before."""
    words = [
        chunk({"content": word}, usage=COMPATIBLE.usage(9, number) | {"total_tokens": number + 9 + 93})
        for number, word in enumerate(("", "1", ", 2"))
    ]
    last = chunk({}, finish_reason="length", usage=COMPATIBLE.usage(9, 3) | {"total_tokens": 105})
    rig.script(Reply(headers={"Content-Type": "text/event-stream"}, steps=(*words, last, DONE)))
    answer = await read_all(rig.provider, COMPATIBLE.job(stream=True))
    check_last(answer, 9, 3 + 93)
    assert reported_usage(answer).reasoning_tokens == 93


@pytest.mark.parametrize(
    "message",
    [
        "The decoder prompt (length 21535) is longer than the maximum model length of 16384. Make sure that ",
        "request (9412 tokens) exceeds the available context size (8192 tokens), try increasing it",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 32769. Given: 40000 `inputs`",
        "This model's maximum prompt length is 131072 but the request contains 136973 tokens.",
        "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
        "The input (233864 tokens) is longer than the model's context length (202752 tokens).",
        "Invalid request: Your request exceeded model token limit: 262144 (requested: 287431)",
        "The number of tokens to keep from the initial prompt is greater than the context length",
        "invalid params, context window exceeds limit (2013)",
        "Range of input length should be [1, 129024]",
        "prompt too long; exceeded max context length by 12 tokens",
    ],
)
@pytest.mark.parametrize("form", ["the message of an error", "an error of a backend", "a text", "a list"])
async def test_a_prompt_that_is_too_long_is_known_by_the_words_of_hosts(
    rig: Rig, message: str, form: str, stream: bool
) -> None:
    said = message + SECRETS
    error: Any = {"message": said, "type": "BadRequestError", "param": None, "code": 400}
    if form == "an error of a backend":
        raw = json.dumps({"error": error})
        error = {"message": "Provider returned error", "code": 400, "metadata": {"raw": raw}}
    elif form == "a text":
        error = said
    body = {"error": error}
    rig.script(Reply(400, steps=(json.dumps([body] if form == "a list" else body).encode(),)))
    failed, _ = await failure(rig.provider, COMPATIBLE.job(stream=stream))
    assert failed.code == "context_length_exceeded"
    check_no_secrets(failed)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"message": "Content Exists Risk", "code": "invalid_request_error"}}),
        (403, {"code": "permission-denied", "error": f"Content violates usage guidelines. {SECRETS}"}),
    ],
    ids=["DeepSeek", "xAI"],
)
async def test_a_prompt_that_a_host_refuses_in_its_own_words_is_not_sent_to_the_next_route(
    rig: Rig, status: int, body: Any, stream: bool
) -> None:
    rig.script(Reply(status, steps=(json.dumps(body).encode(),)))
    failed, _ = await failure(rig.provider, COMPATIBLE.job(stream=stream))
    assert isinstance(failed, UpstreamError)
    assert (failed.code, failed.retry) == ("content_policy_violation", RetryPolicy.NEVER)
    check_no_secrets(failed)


@pytest.mark.parametrize("also", [False, True], ids=["only there", "also beside the choices"])
async def test_the_count_of_a_stream_may_be_within_its_choice(rig: Rig, also: bool) -> None:
    """As Kimi's is."""
    usage = COMPATIBLE.usage(9, 7) | {"cached_tokens": 4}
    last = {"index": 0, "delta": {}, "finish_reason": "stop", "usage": usage}
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"content": "Hi"}}]}, {"choices": [last]}]
    if also:
        chunks.append({"choices": [], "usage": usage})
    steps = [b"data: %s\n\n" % json.dumps(each).encode() for each in chunks]
    rig.script(Reply(headers={"Content-Type": "text/event-stream"}, steps=(*steps, DONE)))
    answer = await read_all(rig.provider, COMPATIBLE.job(stream=True))
    check_last(answer, 9, 7)
    assert reported_usage(answer).cached_input_tokens == 4


@pytest.mark.parametrize("choices", [{}, {"choices": None}, {"choices": []}], ids=str)
@pytest.mark.parametrize(
    ("theirs", "code", "retry"),
    [
        (429, "provider_unavailable", RetryPolicy.SAME_ROUTE),
        ("a_new_one", "provider_failed", RetryPolicy.NEVER),
    ],
)
async def test_an_error_in_place_of_choices_is_mapped_by_its_code(
    rig: Rig, choices: dict[str, Any], theirs: Any, code: str, retry: RetryPolicy, stream: bool
) -> None:
    body = choices | {"error": {"code": theirs, "message": SECRETS}}
    rig.script(Reply(steps=(json.dumps(body).encode(),)))
    error, _ = await failure(rig.provider, COMPATIBLE.job(stream=stream))
    assert isinstance(error, UpstreamError)
    assert (error.code, error.retry) == (code, retry)
    check_no_secrets(error)


@pytest.mark.parametrize("status", [413, 429])
async def test_a_request_that_alone_exceeds_the_rate_limit_goes_to_the_next_route(
    rig: Rig, status: int, stream: bool
) -> None:
    """No wait changes that, and it is no failure of the vendor."""
    message = "Request too large for model `m` on tokens per minute (TPM): Limit 6000, Requested 12328"
    error = {"message": message, "type": "tokens", "code": "rate_limit_exceeded"}
    rig.script(Reply(status, {"Retry-After": "7"}, steps=(json.dumps({"error": error}).encode(),)))
    failed, _ = await failure(rig.provider, COMPATIBLE.job(stream=stream))
    assert isinstance(failed, UpstreamError)
    assert (failed.code, failed.retry, failed.wait) == ("provider_failed", RetryPolicy.NEXT_ROUTE, None)
    assert failed.reason == "the request alone exceeds your account's rate limit at the vendor"


@pytest.mark.parametrize("is_limited", [False, True], ids=["", "limited to what is reserved"])
@pytest.mark.parametrize(
    ("max_tokens", "advice"),
    [(None, "the model takes. Shorten messages"), (9, "model takes. Shorten messages or lower max_tokens")],
)
async def test_a_caller_who_has_set_max_tokens_is_asked_to_lower_them_too(
    rig: Rig, max_tokens: int | None, advice: str, is_limited: bool, stream: bool
) -> None:
    """Vendors refuse a prompt and a limit that the context has no room for together, with the same error."""
    error = {"code": "context_length_exceeded", "message": SECRETS}
    rig.script(Reply(400, steps=(json.dumps({"error": error}).encode(),)))
    call = VendorCall()
    VENDOR_CALL.set(call)
    job = COMPATIBLE.job(hi(max_tokens=max_tokens), stream=stream)
    if is_limited:
        job = replace(job, given=Given(job.input), input=hi(max_tokens=5))
    call.job = job
    failed, _ = await failure(rig.provider, job)
    assert failed.code == "context_length_exceeded"
    assert failed.message.endswith(advice)


@pytest.mark.parametrize(("max_tokens", "code"), [(None, "provider_failed"), (9, "invalid_parameter")])
async def test_a_refused_maximum_is_the_fault_of_the_caller_who_has_set_it(
    rig: Rig, max_tokens: int | None, code: str, stream: bool
) -> None:
    error = {"type": "invalid_request_error", "param": "max_tokens", "message": SECRETS}
    rig.script(Reply(400, steps=(json.dumps({"error": error}).encode(),)))
    call = VendorCall()
    VENDOR_CALL.set(call)
    job = COMPATIBLE.job(hi(max_tokens=max_tokens), stream=stream)
    call.job = job = replace(job, given=Given(job.input), input=hi(max_tokens=5))
    assert (await failure(rig.provider, job))[0].code == code


@pytest.mark.parametrize(
    ("message", "requests"),
    [
        ("Function call is missing a thought_signature in functionCall parts.", 2),
        ("Function call `time` in the 2. content block is missing a `thought_signature`.", 2),
        ("The `reasoning_content` in the thinking mode must be passed back to the API.", 2),
        ("Missing `reasoning_content` field in the assistant message at message index 2.", 2),
        ("thinking is enabled but reasoning_content is missing in assistant tool call message", 2),
        ("Corrupted thought signature.", 1),
        ("property 'reasoning_content' is unsupported", 1),
        ("a parameter is missing", 1),
    ],
)
async def test_a_request_is_sent_again_only_for_missing_thoughts(
    rig: Rig, message: str, requests: int, stream: bool
) -> None:
    body = json.dumps({"error": {"message": message, "code": 400}}).encode()
    rig.script(*[Reply(400, steps=(body,))] * 3)
    failed, _ = await failure(rig.provider, COMPATIBLE.job(stream=stream))
    assert isinstance(failed, UpstreamError)
    assert (failed.code, failed.retry, len(rig.requests)) == (
        "provider_failed",
        RetryPolicy.NEXT_ROUTE,
        requests,
    )
    named = failed.reason == (
        "the vendor requires the model's thoughts behind tool calls, which callers do not have"
    )
    assert named == (requests == 2)


async def test_placeholders_are_remembered_for_a_model_and_its_effort_once_they_were_accepted(
    rig: Rig, stream: bool
) -> None:
    said = "The `reasoning_content` in the thinking mode must be passed back to the API."
    refusal = Reply(400, steps=(json.dumps({"error": {"message": said}}).encode(),))
    is_stubborn = True
    sent: list[bool] = []

    def reply(received: Received) -> Reply:
        sent.append("reasoning_content" in received.body["messages"][1])
        needed = "reasoning_effort" in received.body and (is_stubborn or not sent[-1])
        return refusal if needed else Answer("Hi")(received)

    async def ask(effort: ReasoningEffort.ValueType) -> list[bool]:
        """Sends a task. Returns which of its requests have placeholders."""
        history = [
            message(Role.ROLE_USER, "Hi"),
            message(Role.ROLE_ASSISTANT, "Hi"),
            message(Role.ROLE_USER, "?"),
        ]
        sent.clear()
        with suppress(UpstreamError):
            await read_all(
                rig.provider,
                COMPATIBLE.job(TextInput(messages=history, reasoning_effort=effort), stream=stream),
            )
        return sent

    rig.unscripted = reply
    high, none = ReasoningEffort.REASONING_EFFORT_HIGH, ReasoningEffort.REASONING_EFFORT_UNSPECIFIED
    for _ in range(2):
        assert await ask(high) == [False, True]
    is_stubborn = False
    assert await ask(high) == [False, True]
    assert await ask(high) == [True]
    assert await ask(none) == [False]
    is_stubborn = True
    assert await ask(high) == [True]


def test_a_signature_stands_with_the_first_call_of_each_message_that_calls() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user"},
        {"role": "assistant", "tool_calls": [{}, {}]},
        {"role": "assistant", "content": "Hi"},
    ]
    add_placeholders(messages, MISSING_SIGNATURE)
    assert [list(call) for call in messages[1]["tool_calls"]] == [["extra_content"], []]
    assert [set(message) for message in messages[::2]] == [{"role"}, {"role", "content"}]
