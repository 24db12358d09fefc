"""What the tests of media in a bucket share: uploads, and what is in the bucket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import obstore
from obstore.store import S3Store

from pomelo.call import Call
from pomelo.media.bucket_store import BucketStore
from pomelo.media.local import LocalMedia
from pomelo.runtime.turns import Turns
from tests.calls import call_of
from tests.unit.media.files import PNG, Access

MIB = 1024 * 1024


def keys(url: str) -> list[str]:
    """The keys of all files in the bucket."""
    return [each["path"] for each in obstore.list(S3Store.from_url(url)).collect()]


def service(store: BucketStore) -> LocalMedia:
    return LocalMedia(store, Access(), turns=Turns())


def grpc_call(*, protocol: str = "grpc", relayed: bool = False) -> Call:
    call = call_of(None)
    call.protocol, call.relayed = protocol, relayed
    return call


async def chunks_of(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), MIB):
        yield data[at : at + MIB]


async def upload(store: BucketStore, data: bytes = PNG, call: Call | None = None) -> str:
    return (await service(store).upload_media("image/png", chunks_of(data), call or grpc_call())).id
