"""Parses media types as callers write them: in forms, in `data:` URIs and in gRPC messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

LONGEST = 1024
"""Characters of a media type whose parameters are read."""

_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_VALUE = r'"(?:[^"\\]|\\.)*+"|[^;"]*+'
_PARAMETER = re.compile(rf"\s*+;\s*+(?:({_NAME})\s*+=\s*+({_VALUE}))?+\s*+", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_NOT_OF_THE_MEDIA = frozenset({"charset", "name", "filename"})
"""Parameters that some HTTP libraries add to every part, and that say nothing about the media."""


@dataclass(frozen=True, slots=True)
class MediaType:
    """A media type: its name in lower case, such as audio/pcm, and its parameters.

    `parameters` are None if they can't be read or one of them is given twice.
    """

    name: str
    parameters: Mapping[str, str] | None


def parse(text: str) -> MediaType:
    """The media type in `text`, by RFC 9110, section 5.6.6: values may be quoted, parameters empty.

    Unquoted values may have any characters but `;` and `"`, such as the comma of codecs=vp8,opus. White space
    around names and values is ignored. Parameters that say nothing about the media, such as a charset, are
    left out.
    """
    written, semicolon, _ = text.partition(";")
    name = "".join(written.split()).lower()
    parameters: dict[str, str] = {}
    place = len(written)
    if len(text) > LONGEST and semicolon:
        return MediaType(name, None)
    while place < len(text):
        match = _PARAMETER.match(text, place)
        if match is None:
            return MediaType(name, None)
        place = match.end()
        key = (match[1] or "").lower()
        if not key or key in _NOT_OF_THE_MEDIA:
            continue
        if key in parameters:
            return MediaType(name, None)
        value = match[2]
        parameters[key] = _ESCAPE.sub(r"\1", value[1:-1]) if value.startswith('"') else value.strip()
    return MediaType(name, parameters)
