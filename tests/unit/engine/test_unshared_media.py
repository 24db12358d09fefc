"""Results whose media can't be shared: what of them is still delivered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pomelo.call import Call
from pomelo.catalog.catalog import Catalog
from pomelo.catalog.pricing import Usage
from pomelo.engine import shared_media
from pomelo.engine.job import AcceptedJob
from pomelo.engine.shared_media import share_output
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.media.store import MediaStore
from pomelo.stores.ledger import REPLAY_SECONDS, IdempotencyKey
from tests.calls import call_of
from tests.unit.engine.failing_store import CALLER
from tests.unit.engine.jobs import accepted_job
from tests.unit.refusals import refused

DATA = b"\x89PNG\r\n\x1a\n" + bytes(92)


class Media(MediaStore):
    """Media that are shared for the seconds in `shares`, if they can be."""

    fails = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, b"s" * 32)
        self.shares: list[float | None] = []

    async def share(self, media_id: str, owner: str, lifetime: float | None = None) -> None:
        assert owner == CALLER.owner
        self.shares.append(lifetime)
        if self.fails:
            raise PomeloError("store_unavailable")


@pytest.fixture(name="media")
def _media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Media:
    monkeypatch.setattr(shared_media, "MAX_INLINE_FALLBACK", len(DATA))
    return Media(tmp_path / "media")


def accepted(*, kept: bool = False, stream: bool = False) -> AcceptedJob:
    job = accepted_job("img_1", Catalog.load().models["flux-1-pro"], Usage(images=1), CALLER)
    key = IdempotencyKey("k", b"") if kept else None
    return replace(job, job=replace(job.job, stream=stream), idempotency_key=key)


def made(media: MediaStore, data: bytes = DATA, *, speech: bool = False) -> TaskResult:
    """A result with a link."""
    result = TaskResult()
    output = result.speech if speech else result.image.images.add()
    with media.writer(CALLER.owner, "image/png") as writer:
        writer.write(data)
        output.media.CopyFrom(writer.commit())
    return result


async def test_media_of_usual_results_and_of_stored_answers_are_shared_as_long_as_they_last(
    media: Media,
) -> None:
    media.fails = False
    for kept in (False, True):
        result = made(media)
        await share_output(result, accepted(kept=kept), media)
        assert result.image.images[0].HasField("media")
    assert media.shares == [None, REPLAY_SECONDS + 60]
    assert len(list(media.folder.iterdir())) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_media_that_are_small_enough_are_inline_instead(media: Media, stream: bool) -> None:
    result = made(media)
    await share_output(result, accepted(stream=stream), media)
    (image,) = result.image.images
    assert (image.data, image.HasField("media")) == (DATA, False)
    assert list(media.folder.iterdir()) == []


@pytest.mark.parametrize(("kept", "data"), [(True, DATA), (False, DATA + b"x")], ids=["kept", "large"])
async def test_media_that_are_kept_or_too_large_fail_the_task(media: Media, kept: bool, data: bytes) -> None:
    with refused("store_unavailable"):
        await share_output(made(media, data), accepted(kept=kept), media)
    assert list(media.folder.iterdir()) == []
    assert media.quota.total == 0


async def test_a_stream_that_has_delivered_its_audio_has_no_link(media: Media) -> None:
    result = made(media, DATA + b"x", speech=True)
    await share_output(result, accepted(stream=True), media)
    assert (result.speech.data, result.speech.HasField("media")) == (b"", False)
    assert list(media.folder.iterdir()) == []


async def test_media_without_a_link_are_not_shared(media: Media) -> None:
    result = TaskResult()
    result.image.images.add(data=DATA)
    await share_output(result, accepted(), media)
    assert media.shares == []
    assert result.image.images[0].data == DATA


async def test_a_file_that_is_missing_is_no_error_of_fetching(tmp_path: Path) -> None:
    media = MediaStore(tmp_path, b"s" * 32)
    await shared_media.fetch_files(lambda _: ["nothing"], None, 9, "ann/test", media, call_of(None))


class Fetched(MediaStore):
    """Media that record which files are fetched."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, b"s" * 32)
        self.fetched: list[str] = []

    async def fetch(self, media_id: str, owner: str, call: Call) -> None:
        assert owner == CALLER.owner
        self.fetched.append(media_id)


@pytest.mark.parametrize(("limit", "count"), [(299, 3), (300, 4), (1_000, 4)])
async def test_files_are_fetched_once_up_to_the_first_that_exceeds_the_limit(
    tmp_path: Path, limit: int, count: int
) -> None:
    media = Fetched(tmp_path)
    ids = [made(media).image.images[0].media.id for _ in range(4)]
    named = [ids[0], *ids[:2], *ids[1:]]
    await shared_media.fetch_files(
        lambda task_input: task_input, named, limit, CALLER.owner, media, call_of(None)
    )
    assert media.fetched == ids[:count]


async def test_no_file_is_fetched_after_one_that_does_not_exist(tmp_path: Path) -> None:
    media = Fetched(tmp_path)
    first, last = (made(media).image.images[0].media.id for _ in range(2))
    await shared_media.fetch_files(
        lambda task_input: task_input,
        [first, "missing", last],
        1_000,
        CALLER.owner,
        media,
        call_of(None),
    )
    assert media.fetched == [first, "missing"]
