"""What providers of pictures share: their events, their sizes, and the check that a picture is one.

It knows no vendor and no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from pomelo.catalog.catalog import DEFAULT_IMAGE_SIDE, Route
from pomelo.gen.v1.image_pb2 import GeneratedImage, ImageFormat, ImageInput, ImageOutput, ImageProgress
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.media.content_types import image_type
from pomelo.providers.base import Event
from pomelo.providers.http.errors import malformed_response

FORMATS: Mapping[ImageFormat.ValueType, str] = {
    ImageFormat.IMAGE_FORMAT_UNSPECIFIED: "png",
    ImageFormat.IMAGE_FORMAT_PNG: "png",
    ImageFormat.IMAGE_FORMAT_JPEG: "jpeg",
    ImageFormat.IMAGE_FORMAT_WEBP: "webp",
}
"""The contract's formats by the names that most vendors have for them."""


class ProgressEvents:
    """How far a picture is, as the caller hears it: from 0 to 1, never falling."""

    __slots__ = ("_told",)

    def __init__(self) -> None:
        self._told = -1.0

    def event(self, done: Any) -> Event | None:
        """The event that tells of `done`; None where it is no news, or no number."""
        # A whole number may be too large for a float: it is not asked whether it is finite.
        if type(done) not in (int, float) or (type(done) is float and not isfinite(done)):
            return None
        done = min(max(done, 0.0), 1.0)
        if done <= self._told:
            return None
        self._told = done
        return Event(image_progress=ImageProgress(progress=done))


def sides(given: ImageInput, route: Route) -> dict[str, int]:
    """Width and height in pixels; a side that the caller left open is the default in the route's range."""
    found = {}
    for name in ("width", "height"):
        side = getattr(given, name) if given.HasField(name) else route.fit(name, DEFAULT_IMAGE_SIDE)
        if side is not None:
            found[name] = side
    return found


def numbers(given: ImageInput, names: Mapping[str, str]) -> dict[str, Any]:
    """Steps, guidance and seed where there are any, by the vendor's `names` for the contract's."""
    values = {field.name: value for field, value in given.ListFields()}
    return {theirs: values[name] for name, theirs in names.items() if name in values}


def result(data: bytes) -> Event:
    """The event that bears a finished picture.

    Raises:
        PomeloError: provider_failed; it is no PNG, JPEG or WebP.
    """
    picture = GeneratedImage(data=data, content_type=_content_type(data))
    return Event(result=TaskResult(image=ImageOutput(images=[picture])))


def _content_type(data: bytes) -> str:
    """By the file's first bytes, whatever it was called."""
    found = image_type(data)
    if found is None or found == "image/gif":
        raise malformed_response("a picture that is none")
    return found
