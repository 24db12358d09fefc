"""The files of generated images: only complete ones of the types that the contract has."""

from __future__ import annotations

import pytest

from pomelo.providers.errors import UpstreamError
from pomelo.providers.images import image_result
from pomelo.providers.sandbox.image import encode

ROWS = [bytes(3 * 8)] * 8


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_a_complete_file_has_the_type_of_its_bytes_and_a_part_of_it_is_refused(file_format: str) -> None:
    data = encode(ROWS, 8, 8, file_format)
    (image,) = image_result(data).completed.image.images
    assert (image.data, image.content_type) == (data, f"image/{file_format}")
    with pytest.raises(UpstreamError) as caught:
        image_result(data[:-2])
    assert caught.value.code == "provider_failed"


@pytest.mark.parametrize("data", [b"", b"<html></html>", b"GIF89a" + bytes(20), b"\x89PN", b"%PDF-1.7"])
def test_a_file_of_another_type_is_refused(data: bytes) -> None:
    with pytest.raises(UpstreamError) as caught:
        image_result(data)
    assert caught.value.code == "provider_failed"
