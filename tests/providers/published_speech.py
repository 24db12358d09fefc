"""Requests to ElevenLabs beside those that its own client sends for the same parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import elevenlabs
from pydantic import TypeAdapter

from pomelo.testing import FaultUpstream, Received


async def check_speech(client: Any, upstream: FaultUpstream, kind: str, received: Received) -> None:
    """Holds a request of a task type against the one that the vendor's own client sends to `upstream`.

    Raises:
        AssertionError, TypeError, ValueError: they differ.
    """
    files = [part.name for part in received.form or () if part.filename is not None]
    assert files == {"speech_to_speech": ["audio"], "speech_to_text": ["file"]}.get(kind, [])
    expected = await _official_request(client, upstream, kind, received)
    # The client calls one of the two by its other name.
    assert expected.path.replace("voice-changer", "speech-to-speech") == received.path
    assert (expected.method, expected.query) == (received.method, received.query)
    assert expected.body == received.body
    if received.form is None:
        return
    ours, others = _parts(received), _parts(expected)
    # The client sends some of what it was not given as null.
    assert ours == {
        name: value for name, value in others.items() if name in ours or value != ("text", "null")
    }


async def _official_request(client: Any, upstream: FaultUpstream, kind: str, received: Received) -> Received:
    """Returns the request that the vendor's own client sends for the same parameters; the client accepts only
    declared ones."""
    api = getattr(client, kind)
    ask = api.stream if received.path.endswith("/stream") else api.convert
    types = get_type_hints(ask)
    for name in ("voice_id", "request_options", "return"):
        types.pop(name, None)
    values = {name: _typed(types[name], text) for name, text in received.query.items() if _known(name, types)}
    for name, value in (received.body or {}).items():
        assert _known(name, types)
        values[name] = _settings(value) if name == "voice_settings" else _strict(types[name], value)
    for part in received.form or ():
        assert _known(part.name, types)
        assert part.name not in values, "it is there twice"
        if part.filename is not None:
            assert part.size
            values[part.name] = (part.filename, part.head, part.content_type)
        else:
            values[part.name] = _typed(types[part.name], part.text or "")
            if part.name == "voice_settings":
                _settings(TypeAdapter(dict[str, Any]).validate_json(part.text or ""))
    if kind != "speech_to_text":
        values["voice_id"] = received.path.removesuffix("/stream").rpartition("/")[2]
    options: Any = {"max_retries": 0}
    asked = ask(**values, request_options=options)
    if kind == "speech_to_text":
        await asked
    else:
        async for _ in asked:
            pass
    return upstream.requests[-1]


def _parts(received: Received) -> dict[str, tuple[str, Any]]:
    """The parts of a form: the file's name, type and beginning, and the others' texts."""
    return {
        part.name: ("text", part.text)
        if part.filename is None
        else ("file", (part.filename, part.content_type, part.head))
        for part in received.form or ()
    }


def _known(name: str, types: Mapping[str, Any]) -> bool:
    if name not in types:
        raise TypeError(f"nothing is called {name}")
    return True


def _typed(kind: Any, text: str) -> Any:
    """A text of a form or a query as the value that it stands for."""
    return _strict(kind, TypeAdapter(kind).validate_python(text))


def _strict(kind: Any, value: Any) -> Any:
    if words := _words(kind):
        assert value in words
        return value
    return TypeAdapter(kind).validate_python(value, strict=True)


def _words(kind: Any) -> tuple[Any, ...]:
    """The words that a type names; the client's types take any other, too, but only these are published."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(word for inner in get_args(kind) for word in _words(inner))


def _settings(given: dict[str, Any]) -> elevenlabs.VoiceSettings:
    for name in given:
        _known(name, elevenlabs.VoiceSettings.model_fields)
    return elevenlabs.VoiceSettings.model_validate(given, strict=True)
