"""What the operator does: `AdminService` over the keyring.

`pomelo.server.main.open_admin` serves it on the unix socket; where no server runs, the command line asks an
`AdminServicer` on a store that it opened itself, by the methods in lower case. It checks what is asked for;
how keys are made and kept is the keyring's.
"""

import math
import time
from collections.abc import Callable, Collection
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from pomelo.admission.keys import Keyring
from pomelo.errors import PomeloError, invalid, missing
from pomelo.gen.v1 import admin_service_pb2 as pb
from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceServicer
from pomelo.server.servicers import Rpc, Running, answering
from pomelo.stores.base import DEFAULT_ACCOUNT, KeyRecord, UnknownAccountError


class AdminServicer(AdminServiceServicer):
    """pomelo.v1.AdminService. `models` are the names that a key may be confined to; `now` is Unix time."""

    def __init__(
        self, keyring: Keyring, models: Collection[str], now: Callable[[], float] = time.time
    ) -> None:
        self._keyring = keyring
        self._models = models
        self._now = now
        self.running = Running()

    async def create_key(self, request: pb.CreateKeyRequest) -> pb.CreateKeyResponse:
        """Makes a key.

        Raises:
            PomeloError: not_found (the account), invalid_parameter, store_unavailable.
        """
        if request.mode not in pb.KeyMode.values():
            raise invalid("mode", "KEY_MODE_TEST or KEY_MODE_LIVE")
        for name in request.models:
            if name not in self._models:
                raise invalid("models", f"names of models, and {name[:100]!r} is none. See: pomelo models")
        account = request.account or DEFAULT_ACCOUNT
        try:
            record, secret = await self._keyring.create(
                account,
                live=request.mode == pb.KEY_MODE_LIVE,
                models=dict.fromkeys(request.models),
                expires=self._expires(request),
            )
        except UnknownAccountError as error:
            raise PomeloError(
                "not_found", f"There is no account {account[:100]!r}", field="account"
            ) from error
        return pb.CreateKeyResponse(key=_key(record), secret=secret)

    async def list_keys(self, request: pb.ListKeysRequest) -> pb.ListKeysResponse:
        """The keys of an account, or all.

        Raises:
            PomeloError: store_unavailable.
        """
        records = await self._keyring.list(request.account or None)
        return pb.ListKeysResponse(keys=[_key(record) for record in records])

    async def rotate_key(self, request: pb.RotateKeyRequest) -> pb.RotateKeyResponse:
        """Makes a key like another one, and ends the other.

        Raises:
            PomeloError: missing_parameter, not_found, invalid_parameter, store_unavailable.
        """
        record, secret = await self._keyring.rotate(_key_id(request.key_id))
        return pb.RotateKeyResponse(key=_key(record), secret=secret)

    async def revoke_key(self, request: pb.RevokeKeyRequest) -> pb.RevokeKeyResponse:
        """Ends a key.

        Raises:
            PomeloError: missing_parameter, not_found, store_unavailable.
        """
        return pb.RevokeKeyResponse(key=_key(await self._keyring.revoke(_key_id(request.key_id))))

    # --- the same over gRPC

    @answering
    async def CreateKey(self, request: pb.CreateKeyRequest, rpc: Rpc) -> pb.CreateKeyResponse:
        """See the contract."""
        return await self.create_key(request)

    @answering
    async def ListKeys(self, request: pb.ListKeysRequest, rpc: Rpc) -> pb.ListKeysResponse:
        """See the contract."""
        return await self.list_keys(request)

    @answering
    async def RotateKey(self, request: pb.RotateKeyRequest, rpc: Rpc) -> pb.RotateKeyResponse:
        """See the contract."""
        return await self.rotate_key(request)

    @answering
    async def RevokeKey(self, request: pb.RevokeKeyRequest, rpc: Rpc) -> pb.RevokeKeyResponse:
        """See the contract."""
        return await self.revoke_key(request)

    def _expires(self, request: pb.CreateKeyRequest) -> float | None:
        if not request.HasField("expire_time"):
            return None
        expires = request.expire_time.seconds + request.expire_time.nanos / 1e9
        if expires <= self._now():
            raise invalid("expire_time", "in the future")
        return expires


def _key_id(key_id: str) -> str:
    if not key_id:
        raise missing("key_id")
    return key_id


def _key(record: KeyRecord) -> pb.Key:
    return pb.Key(
        key_id=record.key_id,
        account=record.account,
        mode=pb.KEY_MODE_LIVE if record.live else pb.KEY_MODE_TEST,
        models=record.models,
        create_time=_time(record.created),
        expire_time=_time(record.expires),
        revoke_time=_time(record.revoked),
    )


def _time(at: float | None) -> Any:
    if at is None:
        return None
    part, whole = math.modf(at)
    # Whole milliseconds: a double has no more to tell.
    return Timestamp(seconds=int(whole), nanos=int(part * 1000) * 1_000_000)
