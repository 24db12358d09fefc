"""Requests that are refused: invalid names, values, keys and bodies, with markers in all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pomelo.gen.v1.task_pb2 import TaskSpec
from tests.faults.leak_markers import LABEL_MARKER, MARKER, NAME_MARKER, TASKS
from tests.tasks import to_task

WORD = f"{MARKER}-value"
HELLO = {"model": "gpt-4", **TASKS["gpt-4"]}
SECRETS = (f"pml_live_{MARKER}_{MARKER}", WORD, f"{WORD}é", WORD * 300)
"""Keys that don't exist."""


def labelled(body: Mapping[str, Any]) -> TaskSpec:
    """Returns the task of a REST body, with a user and metadata."""
    spec = to_task(body)
    spec.user = f"{LABEL_MARKER}-user"
    spec.metadata[f"{LABEL_MARKER}-key"] = f"{LABEL_MARKER}-value"
    return spec


def invalid_fields(model: str) -> list[dict[str, Any]]:
    body = {"model": model, **TASKS[model]}
    names = (*TASKS[model], "temperature", "seed", "max_tokens", "width", "output_format", "stream")
    bodies = []
    for name in names:
        word = f"{LABEL_MARKER}-value" if name == "user" else WORD  # any text is a valid user
        bodies += [{**body, name: value} for value in (word, [word], {word: word}, -1, None)]
    return [*bodies, {**body, f"{NAME_MARKER}-field": WORD}]


def invalid_posts() -> Iterator[dict[str, Any]]:
    yield {"json": {"model": f"{NAME_MARKER}-model", "messages": TASKS["gpt-4"]["messages"]}}
    url = {"type": "image_url", "image_url": {"url": f"https://example.com/{WORD}"}}
    for role, content in (
        (WORD, WORD),
        ("user", [{"type": WORD, "text": WORD}]),
        ("user", [WORD]),
        ("user", [url]),
    ):
        yield {"json": {"model": "gpt-4", "messages": [{"role": role, "content": content}]}}
    json_type = {"Content-Type": "application/json"}
    for text in (f'{{"model": "gpt-4", "{WORD}', WORD, f'["{WORD}"]', f'{{"{WORD}": ' * 50_000):
        yield {"data": text.encode(), "headers": json_type}
    word = WORD.encode()
    yield {"data": b'{"model": "gpt-4", "x": "' + word + b'\xff"}', "headers": json_type}
    yield {"data": word * 1_000_000, "headers": json_type}
    yield {"data": word, "headers": {"Content-Type": f"text/{WORD}"}}
    yield {"data": word, "headers": json_type | {"Content-Encoding": WORD}}
    part = f'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\n{NAME_MARKER}\r\n'
    for text in (
        WORD,
        part,
        part + "--B",
        part.replace("form-data;", f"{WORD};"),
        part.replace("\r\n\r\n", f"\r\n{WORD}\r\n\r\n"),
        part.replace("\r\n\r\n", f"\r\nX: {WORD * 2000}\r\n\r\n"),
        part.replace('"model"', f'"{NAME_MARKER}-part"') + "--B--\r\n",
        part.replace("form-data; ", f'form-data; filename="{WORD}"; ').replace("model", "audio")
        + "--B--\r\n",
        part * 2 + "--B--\r\n",
    ):
        yield {"data": text.encode(), "headers": {"Content-Type": "multipart/form-data; boundary=B"}}
    yield {"data": word, "headers": {"Content-Type": f"multipart/form-data; x={WORD}"}}
    for secret in SECRETS:
        yield {"json": HELLO, "headers": {"Authorization": f"Bearer {secret}"}}
    for name in ("Authorization", "X-Request-Timeout", "traceparent", "Accept"):
        yield {"json": HELLO, "headers": {name: WORD}}
    yield {"json": HELLO, "headers": {"X-Large": WORD * 2000}}
    yield {"json": HELLO, "params": {f"{NAME_MARKER}-parameter": WORD}}


def malformed_requests() -> tuple[bytes, ...]:
    """Bytes that are not HTTP, or malformed HTTP."""
    word = f"{MARKER}-http".encode()
    head = b"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + word + b"\r\n"
    return (
        word + b"\r\n\r\n",
        b"GET /" + word + b" HTTP/9.9\r\n\r\n",
        b"GET /" + word * 2000 + b" HTTP/1.1\r\n\r\n",
        b"GET /%ff" + word + b"\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        head + word + b"\r\n\r\n",
        head + b"X: " + word * 2000 + b"\r\n\r\n",
        head + b"X: \0" + word + b"\r\n\r\n",
        head + b"Content-Length: " + word + b"\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\n" + word,
        head + b"Transfer-Encoding: " + word + b"\r\n\r\n" + word,
        head + b"Content-Length: 500\r\nContent-Type: application/json\r\n\r\n" + word,
        head + (b"Y: " + word + b"\r\n") * 200 + b"\r\n",
    )
