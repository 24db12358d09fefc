"""Pictures, seen through PyAV."""

from __future__ import annotations

import asyncio
import io
import zlib
from typing import Any

import av
import pytest

from pomelo.gen.v1.image_pb2 import ImageFormat, ImageInput
from pomelo.providers.sandbox import Sandbox
from tests.unit.providers.sandbox.sandbox_jobs import gather, job, paint

FORMATS = {
    ImageFormat.IMAGE_FORMAT_UNSPECIFIED: ("image/png", "png", b"\x89PNG\r\n\x1a\n"),
    ImageFormat.IMAGE_FORMAT_PNG: ("image/png", "png", b"\x89PNG\r\n\x1a\n"),
    ImageFormat.IMAGE_FORMAT_JPEG: ("image/jpeg", "mjpeg", b"\xff\xd8\xff"),
    ImageFormat.IMAGE_FORMAT_WEBP: ("image/webp", "webp", b"RIFF"),
}


def look(data: bytes) -> tuple[str, int, int, bytes]:
    """Codec, width, height and pixels (3 bytes each, rows joined)."""
    with av.open(io.BytesIO(data)) as container:
        name = container.streams.video[0].codec_context.name
        (frame,) = container.decode(video=0)
        plane = frame.reformat(format="rgb24").planes[0]
        pixels, line = bytes(plane), plane.line_size
        rows = [pixels[y * line : y * line + frame.width * 3] for y in range(frame.height)]
        return name, frame.width, frame.height, b"".join(rows)


@pytest.mark.parametrize("size", [(64, 64), (65, 67), (1024, 1024), (2048, 64), (333, 1440)])
@pytest.mark.parametrize("file_format", FORMATS)
async def test_a_picture_has_the_asked_format_and_size(
    sandbox: Sandbox, file_format: ImageFormat.ValueType, size: tuple[int, int]
) -> None:
    width, height = size
    picture = await paint(sandbox, prompt="a lake", width=width, height=height, output_format=file_format)
    content_type, codec, mark = FORMATS[file_format]
    assert picture.content_type == content_type
    assert picture.data.startswith(mark)
    assert look(picture.data)[:3] == (codec, width, height)


async def test_a_picture_is_1024_pixels_square_by_default(sandbox: Sandbox) -> None:
    picture = await paint(sandbox, prompt="a lake")
    assert look(picture.data)[1:3] == (1024, 1024)
    assert len(picture.data) < 1_000_000


async def test_a_png_is_whole_by_its_checksums(sandbox: Sandbox) -> None:
    data = (await paint(sandbox, prompt="a lake", width=64, height=80)).data
    place, kinds = 8, []
    while place < len(data):
        length = int.from_bytes(data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        assert int.from_bytes(data[place + 8 + length : place + 12 + length]) == zlib.crc32(body)
        kinds.append(body[:4])
        place += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]


async def test_the_same_prompt_and_seed_give_the_same_picture(sandbox: Sandbox) -> None:
    for file_format in FORMATS:
        given: dict[str, Any] = {"prompt": "a lake", "seed": 42, "width": 128, "height": 128}
        given["output_format"] = file_format
        assert (await paint(sandbox, **given)).data == (await paint(Sandbox(), **given)).data


async def test_prompt_seed_and_model_each_change_the_picture(sandbox: Sandbox) -> None:
    size = {"width": 96, "height": 96}
    pictures = [
        await paint(sandbox, prompt="a lake", **size),
        await paint(sandbox, prompt="a city", **size),
        await paint(sandbox, prompt="a lake", seed=0, **size),
        await paint(sandbox, prompt="a lake", seed=1, **size),
        await paint(sandbox, "flux-1-dev", prompt="a lake", **size),
    ]
    seen = [look(picture.data)[3] for picture in pictures]
    for index, one in enumerate(seen):
        for other in seen[:index]:
            different = sum(a != b for a, b in zip(one, other, strict=True))
            assert different > len(one) // 3


async def test_a_picture_has_many_colours_and_shapes(sandbox: Sandbox) -> None:
    _, width, height, pixels = look((await paint(sandbox, prompt="a lake", width=256, height=256)).data)
    colours = {pixels[place : place + 3] for place in range(0, len(pixels), 3)}
    assert len(colours) > 100
    edges = sum(
        pixels[place : place + 3] != pixels[place + 3 : place + 6]
        for y in range(height)
        for place in range(y * width * 3, (y + 1) * width * 3 - 3, 3)
    )
    assert edges > height


async def test_all_formats_show_the_same_picture(sandbox: Sandbox) -> None:
    shown = [
        look((await paint(sandbox, prompt="a lake", width=128, height=128, output_format=f)).data)[3]
        for f in (ImageFormat.IMAGE_FORMAT_PNG, ImageFormat.IMAGE_FORMAT_JPEG, ImageFormat.IMAGE_FORMAT_WEBP)
    ]
    for lossy in shown[1:]:
        away = sum(abs(a - b) for a, b in zip(shown[0], lossy, strict=True)) / len(lossy)
        assert away < 8


async def test_a_stream_tells_progress_and_then_the_picture(sandbox: Sandbox) -> None:
    events = await gather(sandbox.image(job("flux-1-pro", ImageInput(prompt="a lake"), stream=True)))
    progress = [event.image_progress.progress for event in events[:-1]]
    assert progress == [0, 0.25, 0.5, 0.75, 1]
    assert look(events[-1].result.image.images[0].data)[1:3] == (1024, 1024)


async def test_a_whole_answer_is_one_event(sandbox: Sandbox) -> None:
    (event,) = await gather(sandbox.image(job("flux-1-pro", ImageInput(prompt="a lake"), stream=False)))
    assert len(event.result.image.images) == 1


@pytest.mark.parametrize("file_format", FORMATS)
async def test_the_loop_goes_on_while_a_picture_is_drawn(
    sandbox: Sandbox, file_format: ImageFormat.ValueType
) -> None:
    loop = asyncio.get_running_loop()
    gaps = []

    async def watch() -> None:
        before = loop.time()
        while True:
            await asyncio.sleep(0)
            gaps.append(loop.time() - before)
            before = loop.time()

    given = {"prompt": "a lake", "width": 2048, "height": 2048, "output_format": file_format}
    await paint(sandbox, prompt="a lake", output_format=file_format)
    watching = asyncio.create_task(watch())
    began = loop.time()
    await paint(sandbox, **given)
    took = loop.time() - began
    watching.cancel()
    assert len(gaps) > 3
    # Work in the loop itself would be one gap as long as the task; a busy machine stretches both.
    assert max(gaps) < max(0.05, took / 2)
