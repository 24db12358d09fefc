"""The answers stored for an Idempotency-Key, and their media."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pomelo.engine import idempotency
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.media.store import MediaStore
from pomelo.stores.ledger import REPLAY_SECONDS

UNASKED = ResponseFormat.RESPONSE_FORMAT_UNSPECIFIED


def answer(media: MediaStore, data: bytes = b"ID3 a sound") -> TaskResult:
    """The result of a speech task whose audio was stored."""
    result = TaskResult(id="speech_1", model="eleven-labs-tts")
    with media.writer("ann/live", "audio/mpeg") as writer:
        writer.write(data)
        result.speech.media.CopyFrom(writer.commit())
    result.speech.data = data
    return result


def test_media_outlives_the_answer_that_it_belongs_to(tmp_path: Path) -> None:
    media = MediaStore(tmp_path / "media", b"s" * 32)
    result = answer(media)
    idempotency.store_answer(result, UNASKED, media, stream=False)
    # The lifetime of the answer starts at its settlement, a little after this point.
    path, _ = media.find(result.speech.media.media_id, "ann/live")
    lives = path.stat().st_mtime + media.lifetime - time.time()
    assert REPLAY_SECONDS + 30 < lives <= REPLAY_SECONDS + 60


def test_a_kept_answer_comes_back_to_its_owner_alone(tmp_path: Path) -> None:
    media = MediaStore(tmp_path / "media", b"s" * 32)
    kept = idempotency.store_answer(answer(media), UNASKED, media, stream=False)
    assert (
        idempotency.restore_answer(kept, UNASKED, "ann/live", media, stream=False).speech.data
        == b"ID3 a sound"
    )
    for other in ("ann/test", "bob/live"):
        with pytest.raises(PomeloError) as error:
            idempotency.restore_answer(kept, UNASKED, other, media, stream=False)
        assert error.value.code == "store_unavailable"


@pytest.mark.parametrize(
    ("size", "stream", "inline"),
    [(45 * 1024, True, True), (45 * 1024 + 1, True, False), (45 * 1024 + 1, False, True)],
)
def test_a_large_image_comes_back_in_a_stream_as_a_link(
    tmp_path: Path, size: int, stream: bool, inline: bool
) -> None:
    media = MediaStore(tmp_path / "media", b"s" * 32)
    result = TaskResult(id="img_1", model="flux-1-pro")
    image = result.image.images.add(content_type="image/png", data=bytes(size))
    with media.writer("ann/live", "image/png") as writer:
        writer.write(image.data)
        image.media.CopyFrom(writer.commit())
    kept = idempotency.store_answer(result, UNASKED, media, stream=stream)
    (found,) = idempotency.restore_answer(kept, UNASKED, "ann/live", media, stream=stream).image.images
    assert (len(found.data), bool(found.media.url)) == (size if inline else 0, True)
