"""Generated images, decoded with PyAV."""

from __future__ import annotations

import asyncio
import io
import zlib
from typing import Any

import av
import pytest

from pomelo.gen.v1.image_pb2 import ImageFormat, ImageInput
from pomelo.providers.sandbox import Sandbox
from tests.unit.loop import watched
from tests.unit.providers.sandbox.sandbox_jobs import gather, generate_image, job
from tests.waiting import soon

FORMATS = {
    ImageFormat.IMAGE_FORMAT_UNSPECIFIED: ("image/png", "png", b"\x89PNG\r\n\x1a\n"),
    ImageFormat.IMAGE_FORMAT_PNG: ("image/png", "png", b"\x89PNG\r\n\x1a\n"),
    ImageFormat.IMAGE_FORMAT_JPEG: ("image/jpeg", "mjpeg", b"\xff\xd8\xff"),
    ImageFormat.IMAGE_FORMAT_WEBP: ("image/webp", "webp", b"RIFF"),
}


def decode_image(data: bytes) -> tuple[str, int, int, bytes]:
    """Returns codec, width, height and pixels (3 bytes each, rows joined)."""
    with av.open(io.BytesIO(data), "r") as container:
        name = container.streams.video[0].codec_context.name
        (frame,) = container.decode(video=0)
        plane = frame.reformat(format="rgb24").planes[0]
        pixels, line = bytes(plane), plane.line_size
        rows = [pixels[y * line : y * line + frame.width * 3] for y in range(frame.height)]
        return name, frame.width, frame.height, b"".join(rows)


@pytest.mark.parametrize("size", [(64, 64), (65, 67), (1024, 1024), (2048, 64), (333, 1440)])
@pytest.mark.parametrize("file_format", FORMATS)
async def test_an_image_has_the_requested_format_and_size(
    sandbox: Sandbox, file_format: ImageFormat.ValueType, size: tuple[int, int]
) -> None:
    width, height = size
    image = await generate_image(
        sandbox, prompt="a lake", width=width, height=height, output_format=file_format
    )
    content_type, codec, magic = FORMATS[file_format]
    assert image.content_type == content_type
    assert image.data.startswith(magic)
    assert decode_image(image.data)[:3] == (codec, width, height)


async def test_an_image_is_1024_pixels_square_by_default(sandbox: Sandbox) -> None:
    image = await generate_image(sandbox, prompt="a lake")
    assert decode_image(image.data)[1:3] == (1024, 1024)
    assert len(image.data) < 1_000_000


async def test_the_checksums_of_a_png_are_correct(sandbox: Sandbox) -> None:
    data = (await generate_image(sandbox, prompt="a lake", width=64, height=80)).data
    offset, chunk_types = 8, []
    while offset < len(data):
        length = int.from_bytes(data[offset : offset + 4])
        body = data[offset + 4 : offset + 8 + length]
        assert int.from_bytes(data[offset + 8 + length : offset + 12 + length]) == zlib.crc32(body)
        chunk_types.append(body[:4])
        offset += 12 + length
    assert chunk_types == [b"IHDR", b"IDAT", b"IEND"]


async def test_the_same_prompt_and_seed_give_the_same_image(sandbox: Sandbox) -> None:
    for file_format in FORMATS:
        given: dict[str, Any] = {"prompt": "a lake", "seed": 42, "width": 128, "height": 128}
        given["output_format"] = file_format
        assert (await generate_image(sandbox, **given)).data == (
            await generate_image(Sandbox(), **given)
        ).data


async def test_prompt_seed_and_model_each_change_the_image(sandbox: Sandbox) -> None:
    size: dict[str, Any] = {"width": 96, "height": 96}
    images = [
        await generate_image(sandbox, prompt="a lake", **size),
        await generate_image(sandbox, prompt="a city", **size),
        await generate_image(sandbox, prompt="a lake", seed=0, **size),
        await generate_image(sandbox, prompt="a lake", seed=1, **size),
        await generate_image(sandbox, "flux-1-dev", prompt="a lake", **size),
    ]
    decoded = [decode_image(image.data)[3] for image in images]
    for index, one in enumerate(decoded):
        for other in decoded[:index]:
            different = sum(a != b for a, b in zip(one, other, strict=True))
            assert different > len(one) // 3


async def test_an_image_has_many_colours_and_shapes(sandbox: Sandbox) -> None:
    _, width, height, pixels = decode_image(
        (await generate_image(sandbox, prompt="a lake", width=256, height=256)).data
    )
    colours = {pixels[offset : offset + 3] for offset in range(0, len(pixels), 3)}
    assert len(colours) > 100
    edges = sum(
        pixels[offset : offset + 3] != pixels[offset + 3 : offset + 6]
        for y in range(height)
        for offset in range(y * width * 3, (y + 1) * width * 3 - 3, 3)
    )
    assert edges > height


async def test_all_formats_show_the_same_image(sandbox: Sandbox) -> None:
    decoded = [
        decode_image(
            (await generate_image(sandbox, prompt="a lake", width=128, height=128, output_format=f)).data
        )[3]
        for f in (ImageFormat.IMAGE_FORMAT_PNG, ImageFormat.IMAGE_FORMAT_JPEG, ImageFormat.IMAGE_FORMAT_WEBP)
    ]
    for lossy in decoded[1:]:
        difference = sum(abs(a - b) for a, b in zip(decoded[0], lossy, strict=True)) / len(lossy)
        assert difference < 8


async def test_a_stream_reports_progress_and_then_the_image(sandbox: Sandbox) -> None:
    events = await gather(sandbox.image(job("flux-1-pro", ImageInput(prompt="a lake"), stream=True)))
    progress = [event.image_progress.progress for event in events[:-1]]
    assert progress == [0, 0.25, 0.5, 0.75, 1]
    assert decode_image(events[-1].completed.image.images[0].data)[1:3] == (1024, 1024)


async def test_a_unary_answer_is_one_event(sandbox: Sandbox) -> None:
    (event,) = await gather(sandbox.image(job("flux-1-pro", ImageInput(prompt="a lake"), stream=False)))
    assert len(event.completed.image.images) == 1


@pytest.mark.parametrize("file_format", FORMATS)
async def test_the_event_loop_is_not_blocked_while_an_image_is_drawn(
    sandbox: Sandbox, file_format: ImageFormat.ValueType
) -> None:
    loop = asyncio.get_running_loop()
    given: dict[str, Any] = {"prompt": "a lake", "width": 2048, "height": 2048, "output_format": file_format}
    await generate_image(sandbox, prompt="a lake", output_format=file_format)

    async def longest_share(_: int) -> float:
        began = loop.time()
        async with watched() as gaps:
            await generate_image(sandbox, **given)
        assert len(gaps) > 3
        return max(gaps) / max(0.1, loop.time() - began)

    # Work in the loop itself would be one gap as long as the task; a busy machine stretches both.
    await soon(longest_share, 0.5)
