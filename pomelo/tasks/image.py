"""Image tasks: the check of a prompt, its price's measure, and the folding of progress and picture."""

from __future__ import annotations

from pomelo.catalog.catalog import SIDE, Model, Route
from pomelo.catalog.pricing import Usage
from pomelo.errors import PomeloError
from pomelo.gen.v1.image_pb2 import GeneratedImage, ImageFormat, ImageInput
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.tasks.base import (
    MAX_INLINE_FALLBACK,
    AudioInfo,
    CollectorContext,
    Estimate,
    TaskDefinition,
    max_inline,
    no_usage,
)
from pomelo.tasks.fields import MAX_SEED, filled, known, within

SIDE_LEAST, SIDE_MOST = 64, 2048


def check(given: ImageInput, model: Model) -> None:
    """Refuses what no image model could take.

    Raises:
        PomeloError: missing_parameter, invalid_parameter, context_length_exceeded.
    """
    filled(given, "prompt", model.limits.max_characters)
    within(given, "width", SIDE_LEAST, SIDE_MOST)
    within(given, "height", SIDE_LEAST, SIDE_MOST)
    within(given, "num_inference_steps", 1, 100)
    within(given, "guidance_scale", 0, 20)
    within(given, "seed", 0, MAX_SEED)
    known(given, "output_format", ImageFormat)
    known(given, "response_format", ResponseFormat)


def estimate(given: ImageInput, model: Model, route: Route, heard: AudioInfo) -> Estimate:
    """One picture, of the size that the route's model makes of what is asked for."""
    pixels = 1
    for name in ("width", "height"):
        pixels *= getattr(given, name) if given.HasField(name) else route.fit(name, SIDE) or SIDE
    used = Usage(images=1, pixels=pixels)
    return Estimate(used, used, exact=True)


class ImageCollector:
    """Passes progress on; keeps the picture until the end."""

    __slots__ = ("_folding", "_picture")

    def __init__(self, folding: CollectorContext) -> None:
        self._folding = folding
        self._picture: GeneratedImage | None = None

    def add(self, event: StreamTaskResponse) -> StreamTaskResponse | None:
        """See Fold."""
        if event.HasField("image_progress"):
            return event if self._folding.stream else None
        if event.result.image.images:
            self._picture = event.result.image.images[0]
        return None

    def finish(self, result: TaskResult) -> StreamTaskResponse | None:
        """See Fold."""
        picture = self._picture
        if picture is None or not picture.data:
            raise PomeloError("provider_failed")
        wanted = self._folding.input.response_format
        image = result.image.images.add(content_type=picture.content_type)
        inline = len(picture.data) <= max_inline(wanted, stream=self._folding.stream)
        if inline:
            image.data = picture.data
        if wanted != ResponseFormat.RESPONSE_FORMAT_B64_JSON or not inline or self._folding.keep:
            try:
                with self._folding.writer(picture.content_type) as writer:
                    writer.write(picture.data)
                    image.media.CopyFrom(writer.commit())
            except PomeloError:
                # It was paid for: without room for a link, return it inline if it is small enough.
                if self._folding.keep or len(picture.data) > MAX_INLINE_FALLBACK:
                    raise
                image.data = picture.data
        return None

    def used(self) -> tuple[Usage, bool]:
        """See Fold."""
        return self._folding.bound.maximum, True

    def close(self) -> None:
        """See Fold."""


def media_size(given: ImageInput, bound: Estimate) -> int:
    """The media size of images that can't be compressed."""
    return 4 * bound.maximum.pixels


DEFINITION = TaskDefinition("image", "img_", check, ImageCollector, estimate, no_usage, media_size=media_size)
