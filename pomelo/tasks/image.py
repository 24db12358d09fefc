"""Image tasks: validation, estimate and output of generated images."""

from __future__ import annotations

from typing import Any

from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.pricing import Usage
from pomelo.errors import PomeloError
from pomelo.fields import DEFAULT_IMAGE_SIDE, IMAGE_FIELDS, check_enum, check_numbers, check_required_text
from pomelo.gen.v1.image_pb2 import GeneratedImage, ImageFormat, ImageInput
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.tasks.base import (
    MAX_INLINE_FALLBACK,
    AudioInfo,
    Collector,
    CollectorContext,
    Estimate,
    ReadMedia,
    TaskDefinition,
    max_inline,
)


def check(task_input: ImageInput, model: Model, read_media: ReadMedia) -> None:
    """Refuses an input that no image model takes.

    Raises:
        PomeloError: missing_parameter, invalid_parameter, context_length_exceeded.
    """
    check_required_text(task_input, "prompt", model.limits.max_characters)
    check_numbers(task_input, IMAGE_FIELDS)
    check_enum(task_input, "output_format", ImageFormat)


def estimate(task_input: ImageInput, model: Model, route: Route, audio: AudioInfo) -> Estimate:
    """One image, of the requested size or the default one that the route's model draws."""
    pixels = 1
    for name in ("width", "height"):
        if task_input.HasField(name):
            pixels *= getattr(task_input, name)
        else:
            pixels *= route.fit(name, DEFAULT_IMAGE_SIDE) or DEFAULT_IMAGE_SIDE
    usage = Usage(images=1, pixels=pixels)
    return Estimate(usage, usage, exact=True)


class ImageCollector(Collector):
    """Passes progress on, and keeps the image until the end."""

    __slots__ = ("_context", "_image")

    def __init__(self, context: CollectorContext) -> None:
        super().__init__()
        self._context = context
        self._image = GeneratedImage()

    def add(self, event: TaskEvent) -> TaskEvent | None:
        if event.HasField("image_progress"):
            return event
        if event.completed.image.images:
            self._image = event.completed.image.images[0]
        return None

    def finish(self, result: TaskResult) -> None:
        image = self._image
        data = image.data  # a copy each time
        if not data:
            raise PomeloError("provider_failed")
        delivery = self._context.delivery
        output = result.image.images.add(content_type=image.content_type)
        inline = len(data) <= max_inline(delivery, stream=self._context.stream)
        if inline:
            output.data = data
        if delivery != MediaDelivery.MEDIA_DELIVERY_INLINE or not inline or self._context.keep:
            try:
                with self._context.writer(image.content_type) as writer:
                    writer.write(data)
                    output.media.CopyFrom(writer.commit())
            except PomeloError:
                # It was paid for: without space for a link, return it inline if it is small enough.
                if self._context.keep or len(data) > MAX_INLINE_FALLBACK:
                    raise
                output.data = data

    def usage(self, task_input: Any) -> tuple[Usage, bool]:
        return self._context.estimate.maximum, True


def media_size(task_input: ImageInput, estimate: Estimate) -> int:
    """The bytes of an uncompressed image."""
    return 4 * estimate.maximum.pixels


def output_size(result: TaskResult) -> int:
    image = result.image.images[0]
    return len(image.data) or image.media.size_bytes


DEFINITION = TaskDefinition(
    "image", "img_", check, estimate, ImageCollector, output_size, media_size=media_size
)
