"""Parts of forms: parsed from pieces of any size; the bytes around the parts are limited."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.parsing.multipart import (
    MAX_PADDING,
    MAX_PART_HEADER_BYTES,
    MAX_PART_HEADERS,
    MAX_PARTS,
    READ_SIZE,
    FormParts,
    Part,
)
from pomelo.errors import PomeloError
from tests.unit.refusals import refused


class SplitBody:
    """A body in pieces; `bytes_read` counts the bytes that were read."""

    def __init__(self, data: bytes, *steps: int) -> None:
        self.data = data
        self.steps = list(steps)
        self.taken = 0

    async def read_available(self) -> bytes:
        """Returns the next piece."""
        step = self.steps[0] if len(self.steps) == 1 else self.steps.pop(0)
        piece = self.data[self.taken : self.taken + step]
        self.taken += len(piece)
        return piece


async def read(
    content_type: str, source: SplitBody, max_size: int = READ_SIZE, *, arrived: bool = False
) -> list[tuple[str, bytes]]:
    """The names and contents of all parts."""
    parts = FormParts(content_type, source)
    contents_read = []
    while (part := await parts.next()) is not None:
        content = b""
        while piece := await parts.read(max_size, arrived=arrived):
            assert arrived or len(piece) <= max_size
            content += piece
        contents_read.append((part.name, content))
    return contents_read


def form(boundary: bytes, contents: list[bytes], before: bytes = b"", after: bytes = b"\r\n") -> bytes:
    """A form of parts a0, a1, …"""
    parts = b"".join(
        b"--%b\r\nContent-Disposition: form-data; name=a%d\r\n\r\n%b\r\n" % (boundary, i, content)
        for i, content in enumerate(contents)
    )
    return before + parts + b"--" + boundary + b"--" + after


BOUNDARIES = st.sampled_from([b"B", b"a" * 70, b"--", b"-", b"aaab", b"x'()+_,./:=?"])
CONTENTS = st.lists(
    st.lists(
        st.sampled_from(
            [b"\r", b"\n", b"\r\n", b"-", b"--", b"a", b"aaa", b"B", b"\r\n-", b"\r\n--a", b"\0"]
        ),
        max_size=12,
    ).map(b"".join),
    min_size=1,
    max_size=4,
)


@given(
    BOUNDARIES,
    CONTENTS,
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 50),
    st.booleans(),
)
def test_parts_do_not_depend_on_how_the_body_is_split(
    boundary: bytes, contents: list[bytes], steps: list[int], max_size: int, arrived: bool
) -> None:
    contents = [content for content in contents if b"\r\n--" + boundary not in b"\r\n" + content + b"\r\n"]
    if not contents:
        return
    source = SplitBody(form(boundary, contents), *steps)
    contents_read = asyncio.run(
        read(f'multipart/form-data; boundary="{boundary.decode()}"', source, max_size, arrived=arrived)
    )
    assert contents_read == [(f"a{i}", content) for i, content in enumerate(contents)]


async def bytes_until_refused(
    data: bytes, content_type: str = "multipart/form-data; boundary=B", step: int = 1000
) -> int:
    """Checks that a body is refused; returns the number of bytes read until then."""
    source = SplitBody(data, step)
    with pytest.raises(PomeloError) as caught:
        await read(content_type, source)
    assert caught.value.code == "invalid_body"
    return source.taken


async def test_the_bytes_before_the_first_part_and_after_the_last_are_limited() -> None:
    for line in (b"\r\n", b"\n", b"x", b"--b\r\n", b"\r\n-"):
        around = line * (MAX_PADDING // len(line))
        source = SplitBody(form(b"B", [b"x"], around[:-2] + b"\r\n", b"\r\n" + around[:-2]), 100)
        assert await read("multipart/form-data; boundary=B", source) == [("a0", b"x")]
        flood = line * (8_000_000 // len(line))
        assert await bytes_until_refused(flood) <= MAX_PADDING + 1000 + 5
        assert await bytes_until_refused(form(b"B", [b"x"], after=flood)) <= 2 * MAX_PADDING + 1000


@pytest.mark.parametrize("before", [b"\n", b"x", b"preamble\n", b"\r\r"])
async def test_a_first_part_without_a_line_end_before_it_is_not_skipped(before: bytes) -> None:
    data = form(b"B", [b"x", b"y"], before)
    assert await bytes_until_refused(data) == len(data)


async def test_parts_and_their_headers_are_limited() -> None:
    assert await bytes_until_refused(form(b"B", [b""] * (MAX_PARTS + 1))) > 0
    start = b"--B\r\nContent-Disposition: form-data; name=a"
    assert await bytes_until_refused(start + b"\r\nA: " + b"x" * 10_000_000) <= MAX_PART_HEADER_BYTES + 1000
    assert await bytes_until_refused(start + b"\r\n" + b"A:\r\n" * 2_000_000) <= MAX_PART_HEADER_BYTES + 1000
    assert await bytes_until_refused(start + b"\r\n" + b"A:\r\n" * 16 + b"\r\nx\r\n--B--\r\n") > 0
    for line in (b"no colon", b"A b: c", b": c", b"A\0: b", b"A: b\nC: d", b" folded: x"):
        assert await bytes_until_refused(start + b"\r\n" + line + b"\r\n\r\nx\r\n--B--\r\n") > 0


async def test_the_maximum_number_of_parts_and_headers_is_accepted() -> None:
    contents = [b"x"] * MAX_PARTS
    found = await read("multipart/form-data; boundary=B", SplitBody(form(b"B", contents), 1000))
    assert [content for _, content in found] == contents
    more = b"".join(b"X-%d: y\r\n" % i for i in range(MAX_PART_HEADERS - 1))
    assert (await part(b'Content-Disposition: form-data; name="a"\r\n' + more)).name == "a"


async def part(head: bytes) -> Part:
    """The first part of a form with these header lines."""
    body = b"--B\r\n" + head + b"\r\nx\r\n--B--\r\n"
    found = await FormParts("multipart/form-data; boundary=B", SplitBody(body, 1000)).next()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (b"Content-Type: audio/mpeg", b"content-type: audio/pcm"),
        (b"Content-Type: text/plain", b"Content-Type: text/plain"),
        (b"Content-Disposition: form-data; name=b", b"A: b"),
        (b"Content-Transfer-Encoding: binary", b"CONTENT-TRANSFER-ENCODING: base64"),
    ],
)
async def test_a_part_with_a_header_twice_is_refused(first: bytes, second: bytes) -> None:
    with refused("invalid_body", match="Send each header once"):
        await part(b"Content-Disposition: form-data; name=a\r\n" + first + b"\r\n" + second + b"\r\n")


async def test_other_headers_of_a_part_are_ignored_and_may_be_repeated() -> None:
    assert (await part(b"A: b\r\nA: c\r\nContent-Disposition: form-data; name=a\r\nA: d\r\n")).name == "a"


@pytest.mark.parametrize(
    ("parameters", "filename"),
    [
        (b"name=a", None),
        (b'name=a; filename="in.mp3"', "in.mp3"),
        (b"name=a; filename*=UTF-8''in.mp3", "UTF-8''in.mp3"),
        (b"name=a; filename*=UTF-8''b.mp3; filename=a.mp3", "a.mp3"),
        (b'name=a; filename=""', ""),
    ],
)
async def test_a_file_name_may_be_plain_or_extended(parameters: bytes, filename: str | None) -> None:
    assert (await part(b"Content-Disposition: form-data; " + parameters + b"\r\n")).filename == filename


@pytest.mark.parametrize("encoding", [b"", b"7bit", b"8bit", b"binary", b"BINARY"])
async def test_a_transfer_encoding_without_effect_is_accepted(encoding: bytes) -> None:
    head = b"Content-Disposition: form-data; name=a\r\nContent-Transfer-Encoding: " + encoding + b"\r\n"
    assert (await part(head)).name == "a"


@pytest.mark.parametrize(
    ("given", "boundary"),
    [
        ("multipart/form-data; boundary=B", b"B"),
        ("multipart/form-data; boundary=" + "x" * 70, b"x" * 70),
        (f'multipart/form-data; boundary="{"x" * 70}"', b"x" * 70),
        (f'multipart/form-data; boundary="{"x" * 71}"', None),
        ('Multipart/Form-Data; charset=utf-8; BOUNDARY="a b"', b"a b"),
        ("multipart/form-data;boundary=----WebKitFormBoundaryx;charset=utf-8", b"----WebKitFormBoundaryx"),
        ("multipart/form-data; boundary=B ; a=b", b"B"),
        ("multipart/form-data; boundary=" + "x" * 71, None),
        ('multipart/form-data; boundary="a "', None),
        ("multipart/form-data; boundary=", None),
        ("multipart/form-data; boundary=\u00e9", None),
        ("multipart/form-data; xboundary=B", None),
        ("multipart/form-data", None),
        ('multipart/form-data; boundary="unclosed', None),
        ("multipart/form-data; boundary=B; boundary=C", None),
        ('multipart/form-data; boundary="C"; boundary=B', None),
    ],
)
async def test_a_boundary_is_a_token_or_quoted(given: str, boundary: bytes | None) -> None:
    if boundary is None:
        with refused("invalid_body"):
            FormParts(given, SplitBody(b"", 1))
    else:
        assert await read(given, SplitBody(form(boundary, [b"x"]), 7)) == [("a0", b"x")]


async def test_all_of_a_file_that_has_arrived_is_read_in_one_step() -> None:
    source = SplitBody(form(b"B", [b"x" * 300_000, b"y"]), 100_000)
    parts = FormParts("multipart/form-data; boundary=B", source)
    assert (await parts.next()).name == "a0"  # type: ignore[union-attr]
    sizes = []
    while piece := await parts.read(arrived=True):
        sizes.append(len(piece))
    assert sum(sizes) == 300_000
    assert len(sizes) == 4
    assert min(sizes[:-1]) > 99_000


async def test_the_unread_rest_of_a_part_is_skipped() -> None:
    parts = FormParts("multipart/form-data; boundary=B", SplitBody(form(b"B", [b"x" * 300_000, b"y"]), 5000))
    assert (await parts.next()).name == "a0"  # type: ignore[union-attr]
    assert len(await parts.read(10)) == 10
    assert (await parts.next()).name == "a1"  # type: ignore[union-attr]
    assert await parts.read() == b"y"
    assert await parts.read() == b""
    assert await parts.read() == b""
    assert await parts.next() is None


@pytest.mark.parametrize(
    "unit",
    [b"\r\n--" + b"a" * 69 + b"b", b"a", b"\r\n", b"\r", b"\r\n--", b"--" + b"a" * 69],
    ids=["almost the boundary", "its letter", "lines", "returns", "its beginning", "no line"],
)
@pytest.mark.parametrize("step", [65_536, 20_000, 333])
async def test_content_that_resembles_the_boundary_takes_linear_time(unit: bytes, step: int) -> None:
    async def cpu_seconds(content: bytes) -> float:
        source: Any = SplitBody(form(b"a" * 70, [content]), step)
        begin = time.process_time()
        ((_, contents_read),) = await read("multipart/form-data; boundary=" + "a" * 70, source)
        assert contents_read == content
        return time.process_time() - begin

    # Quadratic time would take minutes; measured: a hundredth of a second.
    assert await cpu_seconds(unit * (4_000_000 // len(unit))) < 2.0
