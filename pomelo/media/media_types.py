"""Parses media types (RFC 9110) as callers write them in forms, `data:` URIs and gRPC messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_LENGTH = 1024
"""Characters of a media type that are read; the parameters of a longer one are not."""

_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_VALUE = r'"(?:[^"\\]|\\.)*+"|[^;"]*+'
_PARAMETER = re.compile(rf"\s*+;\s*+(?:({_NAME})\s*+=\s*+({_VALUE}))?+\s*+", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_IGNORED_PARAMETERS = frozenset({"charset", "name", "filename"})
"""Parameters that some HTTP libraries add to every part of a form; they do not describe the media."""


@dataclass(frozen=True, slots=True)
class MediaType:
    """A media type: its name in lower case, such as audio/pcm, and its parameters.

    `parameters` is None if they can't be parsed or one of them is given twice.
    """

    name: str
    parameters: Mapping[str, str] | None


def parse(text: str) -> MediaType:
    """The media type in `text`, by RFC 9110, section 5.6.6: values may be quoted, parameters empty.

    Unquoted values may have any characters except `;` and `"`, such as the comma of codecs=vp8,opus. White
    space around names and values is ignored. Parameters that do not describe the media, such as a charset,
    are left out.
    """
    type_text, semicolon, _ = text.partition(";")
    name = "".join(type_text[:MAX_LENGTH].split()).lower()
    parameters: dict[str, str] = {}
    position = len(type_text)
    if len(text) > MAX_LENGTH and semicolon:
        return MediaType(name, None)
    while position < len(text):
        match = _PARAMETER.match(text, position)
        if match is None:
            return MediaType(name, None)
        position = match.end()
        key = (match[1] or "").lower()
        if not key or key in _IGNORED_PARAMETERS:
            continue
        if key in parameters:
            return MediaType(name, None)
        value = match[2]
        parameters[key] = _ESCAPE.sub(r"\1", value[1:-1]) if value.startswith('"') else value.strip()
    return MediaType(name, parameters)
