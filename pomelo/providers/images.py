"""Events, sizes and checks that providers of images share."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from pomelo.catalog.catalog import Route
from pomelo.fields import DEFAULT_IMAGE_SIDE
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
"""The contract's formats -> the names that most vendors use."""


class ProgressEvents:
    """Makes the progress events of an image: from 0 to 1, never falling."""

    __slots__ = ("_reported",)

    def __init__(self) -> None:
        self._reported = -1.0

    def event(self, progress: Any) -> Event | None:
        """Return the event for a progress; None if it has not grown, or is not a finite number."""
        # isfinite() fails for a whole number that is too large for a float.
        if type(progress) not in (int, float) or (type(progress) is float and not isfinite(progress)):
            return None
        progress = min(max(progress, 0.0), 1.0)
        if progress <= self._reported:
            return None
        self._reported = progress
        return Event(image_progress=ImageProgress(progress=progress))


def image_size(image: ImageInput, route: Route) -> dict[str, int]:
    """Return width and height in pixels; if the caller did not set one, the default in the route's range."""
    size = {}
    for name in ("width", "height"):
        side = getattr(image, name) if image.HasField(name) else route.fit(name, DEFAULT_IMAGE_SIDE)
        if side is not None:
            size[name] = side
    return size


def renamed_fields(image: ImageInput, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields in `names` that are set, by the vendor's names: `names` maps ours to the vendor's."""
    values = {field.name: value for field, value in image.ListFields()}
    return {vendor_name: values[name] for name, vendor_name in names.items() if name in values}


def contract_names(names: Mapping[str, str]) -> dict[str, str]:
    """Return the vendor's name of each parameter -> ours. `names` maps ours to the vendor's where they
    differ."""
    same = ("prompt", "width", "height", "output_format")
    return {name: name for name in same} | {vendor_name: name for name, vendor_name in names.items()}


def image_result(data: bytes) -> Event:
    """Return the event of a finished image. The content type is that of the file's first bytes.

    Raises:
        UpstreamError: provider_failed; the file is not a PNG, JPEG or WebP.
    """
    content_type = image_type(data)
    if content_type is None or content_type == "image/gif":
        raise malformed_response("a file that is not an image")
    image = GeneratedImage(data=data, content_type=content_type)
    return Event(result=TaskResult(image=ImageOutput(images=[image])))
