"""Image generation: `image.generation` objects, `image.progress` objects, and raw images."""

from __future__ import annotations

from pydantic_core import to_json

from gateway.openapi.schema import nullable, one_of, text_schema
from gateway.types.base import (
    MEDIA_SCHEMA,
    RESPONSE_FORMAT,
    Link,
    StreamObjects,
    TaskFormat,
    by_name,
    choice_field,
    integer_field,
    number_field,
    open_object,
    render_media,
    result_schema,
    text_field,
)
from pomelo.gen.v1.image_pb2 import ImageFormat, ImageProgress
from pomelo.gen.v1.task_pb2 import TaskResult


def render_result(result: TaskResult, link: Link) -> bytes:
    """Returns an `image.generation` object."""
    images = b",".join(
        render_media(link(image.media.url) if image.HasField("media") else "", image.data)
        for image in result.image.images
    )
    return open_object(result, "image.generation") + b',"data":[' + images + b"]}"


def render_progress(objects: StreamObjects, progress: ImageProgress) -> tuple[bytes, ...]:
    """Returns an `image.progress` object."""
    return (objects.prefix("image.progress", b',"progress":') + to_json(progress.progress) + b"}",)


FORMAT = TaskFormat(
    name="image",
    input="image",
    output="image",
    schema_name="ImageTask",
    result_schema_name="ImageGeneration",
    schemas={
        "ImageGeneration": result_schema(
            "image.generation", "img", data={"type": "array", "items": MEDIA_SCHEMA, "minItems": 1}
        )
    },
    example_model="flux-1-pro",
    required=("prompt",),
    fields=by_name(
        text_field("prompt", text_schema(1, 10_000, description="What to draw.")),
        integer_field("width", nullable("integer", 64, 2048, description="In pixels.", default=1024), 32),
        integer_field("height", nullable("integer", 64, 2048, description="In pixels.", default=1024), 32),
        integer_field("num_inference_steps", nullable("integer", 1, 100), 32),
        number_field("guidance_scale", nullable("number", 0, 20)),
        integer_field("seed", nullable("integer", 0, 2**53 - 1, description="For the same image.")),
        choice_field(
            "output_format",
            one_of("png", "jpeg", "webp"),
            {
                "png": ImageFormat.IMAGE_FORMAT_PNG,
                "jpeg": ImageFormat.IMAGE_FORMAT_JPEG,
                "jpg": ImageFormat.IMAGE_FORMAT_JPEG,
                "webp": ImageFormat.IMAGE_FORMAT_WEBP,
            },
            "png, jpeg, webp",
        ),
        RESPONSE_FORMAT,
    ),
    render_result=render_result,
    event="image_progress",
    render_event=render_progress,
    media_range="image/",
    output_formats={
        "image/png": ImageFormat.IMAGE_FORMAT_PNG,
        "image/jpeg": ImageFormat.IMAGE_FORMAT_JPEG,
        "image/webp": ImageFormat.IMAGE_FORMAT_WEBP,
    },
    raw_media=lambda result: result.image.images[0],
)
