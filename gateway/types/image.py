"""Image generation: `image.generation` objects, `image.progress` objects, and raw images."""

from __future__ import annotations

from pydantic_core import to_json

from gateway.types import fields
from gateway.types.base import (
    LARGE_FILE,
    MEDIA_SCHEMA,
    Link,
    StreamObjects,
    TaskFormat,
    open_object,
    render_media,
    result_schema,
)
from pomelo.fields import IMAGE_FIELDS
from pomelo.gen.v1.image_pb2 import ImageFormat, ImageProgress
from pomelo.gen.v1.task_pb2 import TaskResult


def render_result(result: TaskResult, link: Link) -> bytes:
    return render_images(open_object(result, "image.generation"), result, link)


def render_images(start: bytes, result: TaskResult, link: Link) -> bytes:
    """Returns the JSON object that begins with `start` and ends with the images as `data`."""
    images = b",".join([render_media(image, link) for image in result.image.images])
    return b"".join((start, b',"data":[', images, b"]}"))


def _is_large(result: TaskResult) -> bool:
    return any(len(image.data) > LARGE_FILE for image in result.image.images)


def render_progress(objects: StreamObjects, progress: ImageProgress) -> tuple[bytes, ...]:
    return (objects.prefix("image.progress", b',"progress":') + to_json(progress.progress) + b"}",)


_FORMATS = fields.enum_values(ImageFormat, IMAGE_FIELDS["output_format"].choices)

FORMAT = TaskFormat(
    name="image",
    input="image",
    output="image",
    schema_name="ImageTask",
    result_schema_name="ImageGeneration",
    schemas={
        "ImageGeneration": result_schema(
            "image.generation", "img", data={"type": "array", "items": MEDIA_SCHEMA, "minItems": 1}
        ),
        "ImageProgress": result_schema(
            "image.progress", "img", progress={"type": "number", "minimum": 0, "maximum": 1}
        ),
    },
    stream_schema_names=("ImageProgress", "ImageGeneration"),
    example_model="flux-1-pro",
    examples={
        "An image": {
            "model": "flux-1-pro",
            "prompt": "A futuristic city at night with neon lights",
            "width": 1024,
            "height": 1024,
            "response_format": "url",
        }
    },
    result_example={"data": [{"url": "https://your-domain.com/media/media_01.png?exp=1234571490&sig=AbC"}]},
    rules=IMAGE_FIELDS,
    fields=fields.by_name(
        fields.text("prompt", description="What to draw."),
        fields.integer("width", IMAGE_FIELDS, description="In pixels.", bits=32),
        fields.integer("height", IMAGE_FIELDS, description="In pixels.", bits=32),
        fields.integer("num_inference_steps", IMAGE_FIELDS, bits=32),
        fields.number("guidance_scale", IMAGE_FIELDS),
        fields.integer("seed", IMAGE_FIELDS, description="For the same image."),
        fields.choice(
            "output_format",
            {**_FORMATS, "jpg": ImageFormat.IMAGE_FORMAT_JPEG},
            aliases={"jpg"},
        ),
        fields.RESPONSE_FORMAT,
        fields.METADATA,
    ),
    render_result=render_result,
    render_events={"image_progress": render_progress},
    media_range="image/",
    output_formats={
        **{f"image/{name}": value for name, value in _FORMATS.items()},
        "image/jpg": ImageFormat.IMAGE_FORMAT_JPEG,
    },
    raw_media=lambda result: result.image.images[0],
    is_slow=_is_large,
)
