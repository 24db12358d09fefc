"""A clock of real time, an empty media store, a measurer of audio, and S3 servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from pomelo.media.bucket import Bucket
from pomelo.media.bucket_store import BucketStore
from pomelo.media.duration import Measurer
from pomelo.media.quota import MediaLimits
from pomelo.media.store import MediaStore
from tests.s3_server import S3Server, any_server
from tests.unit.media.files import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> MediaStore:
    return MediaStore(tmp_path / "media", b"s" * 32, public_url="https://pomelo.test", lifetime=60, now=clock)


@pytest.fixture(scope="module")
async def measurer() -> AsyncIterator[Measurer]:
    """A measurer whose processes are shared by the tests of a module."""
    measurer = Measurer()
    yield measurer
    await measurer.aclose()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A server of buckets, whose credentials are in the environment."""
    server = any_server()
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def url(server: S3Server) -> str:
    """The URL of a new bucket."""
    return server.new_bucket()


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server that a test may pause and end."""
    server = S3Server().start()
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


@pytest.fixture(name="machine")
def _machine(tmp_path: Path, url: str, clock: Clock) -> Callable[..., BucketStore]:
    """Makes the store of one machine; all have the same bucket and the same secret."""

    def machine(name: str, *, secret: bytes = b"s" * 32, **limits: int) -> BucketStore:
        return BucketStore(
            Bucket(url),
            tmp_path / name,
            secret,
            public_url="https://pomelo.test",
            lifetime=60,
            limits=MediaLimits(**{"reserve": 0, **limits}),
            now=clock,
        )

    return machine
