"""Usage records as their readers get them: what is asked for is checked, and pages are sealed.

The account service asks for one side of an account, the operator's service for any. How records come about
is the ledger's; nothing here knows who may see what.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from typing import Any

from pomelo import times
from pomelo.accounts.pages import wrong_token
from pomelo.errors import invalid
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.secrets import derive_key
from pomelo.stores.usage import UsageQuery, UsageRecord, UsageStore, UsageTotal

PAGE_SIZE = 100
"""Records of a page where none is asked for."""

MAX_PAGE_SIZE = 1_000
"""The most records or sums of a page that can be asked for."""

SUMS_PAGE_SIZE = 10_000
"""Sums in a page by default: as many as fit into a message of 4 MiB, more than most accounts
have."""

_SEAL = 16
"""Bytes of a page token that vouch for the rest."""

_GROUPS = {
    pb.USAGE_GROUP_MODEL: "model",
    pb.USAGE_GROUP_KEY: "key",
    pb.USAGE_GROUP_DAY: "day",
    pb.USAGE_GROUP_ACCOUNT: "account",
}
_SOURCES = {
    "provider": pb.USAGE_SOURCE_PROVIDER,
    "estimated": pb.USAGE_SOURCE_ESTIMATED,
    "recovered": pb.USAGE_SOURCE_RECOVERED,
}


class UsageReader:
    """Answers what is asked of usage records. `root_secret` is that of the settings: a page token is good on
    every machine that shares it."""

    def __init__(self, store: UsageStore, root_secret: bytes) -> None:
        self._store = store
        self._key = derive_key(root_secret, "usage-page")

    async def list(
        self, request: pb.ListUsageRequest, account: str | None, live: bool | None
    ) -> pb.ListUsageResponse:
        """What `request` asks for, of one account or (None) all, of one side or (None) both.

        Raises:
            PomeloError: invalid_parameter, store_unavailable.
        """
        query = UsageQuery(
            account=account,
            live=live,
            model=request.model or None,
            key_id=request.key_id or None,
            since=_moment(request, "from_time"),
            until=_moment(request, "to_time"),
        )
        if not 0 <= request.page_size <= MAX_PAGE_SIZE:
            raise invalid("page_size", f"1 to {MAX_PAGE_SIZE:,}")
        if request.group_by == pb.USAGE_GROUP_UNSPECIFIED:
            return await self._page(query, request.page_size or PAGE_SIZE, request.page_token)
        by = _GROUPS.get(request.group_by)
        if by is None:
            raise invalid("group_by", "model, key, day or account")
        return await self._sums(query, by, request.page_size or SUMS_PAGE_SIZE, request.page_token)

    async def _sums(self, query: UsageQuery, by: str, size: int, token: str) -> pb.ListUsageResponse:
        after = self._opened(token, query, by) if token else ""
        totals = await self._store.sum_usage(query, by, limit=size + 1, after=after)
        more = len(totals) > size
        return pb.ListUsageResponse(
            totals=[_total(row) for row in totals[:size]],
            next_page_token=self._sealed(totals[size - 1].group, query, by) if more else "",
        )

    async def _page(self, query: UsageQuery, size: int, token: str) -> pb.ListUsageResponse:
        after = self._opened(token, query) if token else ""
        try:
            records, following = await self._store.list_usage(query, limit=size, after=after)
        except ValueError as error:
            raise wrong_token() from error
        return pb.ListUsageResponse(
            records=[usage_message(record) for record in records],
            next_page_token=self._sealed(following, query) if following else "",
        )

    def _sealed(self, after: str, query: UsageQuery, by: str = "") -> str:
        """A token that is good for this query alone."""
        place = after.encode()
        return base64.urlsafe_b64encode(self._seal(place, query, by) + place).rstrip(b"=").decode()

    def _opened(self, token: str, query: UsageQuery, by: str = "") -> str:
        try:
            data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise wrong_token() from None
        seal, place = data[:_SEAL], data[_SEAL:]
        if not hmac.compare_digest(seal, self._seal(place, query, by)):
            raise wrong_token()
        return place.decode()

    def _seal(self, place: bytes, query: UsageQuery, by: str) -> bytes:
        asked = repr(query) + (f" by {by}" if by else "")
        return hmac.digest(self._key, asked.encode() + b"\0" + place, "sha256")[:_SEAL]


def usage_message(record: UsageRecord) -> pb.UsageRecord:
    """A record as it travels."""
    return pb.UsageRecord(
        id=record.task_id,
        request_id=record.request_id,
        account=record.account,
        key_id=record.key_id,
        wire=record.wire,
        model=record.model,
        provider=record.provider,
        provider_model=record.provider_model,
        task_type=_kind(record.task_type),
        input_tokens=record.input_tokens,
        output_tokens=record.output_tokens,
        characters=record.characters,
        images=record.images,
        audio_seconds=record.audio_ms / 1000,
        processing_ms=record.processing_ms,
        first_byte_ms=record.first_byte_ms,
        output_bytes=record.output_bytes,
        cost_micros=record.cost,
        price_version=record.price_version,
        live=record.live,
        source=_SOURCES.get(record.source, pb.USAGE_SOURCE_UNSPECIFIED),
        complete=record.complete,
        time=times.to_timestamp(record.at),
        cached_input_tokens=record.cached_input_tokens,
        cache_write_input_tokens=record.cache_write_input_tokens,
        cache_write_1h_input_tokens=record.cache_write_1h_input_tokens,
        provider_cost_micros=record.provider_micros,
    )


def _kind(name: str) -> Any:
    value = TaskType.DESCRIPTOR.values_by_name.get(f"TASK_TYPE_{name.upper().replace('-', '_')}")
    return value.number if value is not None else TaskType.TASK_TYPE_UNSPECIFIED


def _total(row: UsageTotal) -> pb.UsageTotal:
    return pb.UsageTotal(
        group=row.group,
        tasks=row.tasks,
        input_tokens=row.input_tokens,
        output_tokens=row.output_tokens,
        characters=row.characters,
        images=row.images,
        audio_seconds=row.audio_ms / 1000,
        output_bytes=row.output_bytes,
        cost_micros=row.cost,
        cached_input_tokens=row.cached_input_tokens,
        cache_write_input_tokens=row.cache_write_input_tokens,
    )


def _moment(request: pb.ListUsageRequest, name: Any) -> float | None:
    if not request.HasField(name):
        return None
    try:
        return times.from_timestamp(getattr(request, name))
    except ValueError as error:
        raise invalid(name, str(error)) from None
