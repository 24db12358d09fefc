"""The ports between the doors (gRPC servicers, REST gateway) and the house.

The engine implements them here; `pomelo.server.remote` implements them over a channel. A door can't tell
which it holds. All methods raise `PomeloError` and nothing else, and fill `call.reply`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.account_service_pb2 import Account, ListUsageRequest, ListUsageResponse
from pomelo.gen.v1.media_pb2 import Media
from pomelo.gen.v1.model_service_pb2 import Model
from pomelo.gen.v1.task_pb2 import Task, TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse


class Visit(Protocol):
    """A call that was admitted. Close it when the call ends."""

    def reserve(self, size: int) -> None:
        """Counts `size` more bytes of the call's body or message as buffered, until it is closed.

        Raises:
            PomeloError: overloaded; nothing was counted.
        """
        ...

    async def refuse(self, error: PomeloError, model: str = "") -> PomeloError:
        """The error to return when the body or message is refused with `error`: `error` itself, or
        one that takes precedence (a header, the model, the minute's limit). Fills `call.reply`.

        An unreadable or too large body, and a refused one above 64 KiB, counts as a request. `model` is the
        model that the body names, empty if it can't be read.
        """
        ...

    async def refuse_task(self, error: PomeloError) -> PomeloError:
        """The error to return when a task is refused whose body was good so far: as `refuse`, if the task is
        invalid and its body is above 64 KiB; else `error` itself."""
        ...

    def close(self) -> None:
        """The call has ended. Idempotent."""
        ...


class AccessService(Protocol):
    """Checks a call's key from its headers, before its body or message is read."""

    async def admit(self, call: Call) -> Visit:
        """Checks the key, and counts the call as in flight for its account until the visit is closed.

        Raises:
            PomeloError: invalid_api_key, concurrency_limit_exceeded, overloaded, store_unavailable.
        """
        ...


class TaskService(Protocol):
    """Runs tasks."""

    async def run_task(self, task: Task, call: Call) -> TaskResult:
        """Runs `task` to its end. Cancelling closes it at the provider.

        Raises:
            PomeloError: any row of the table; nothing was delivered.
        """
        ...

    def stream_task(
        self, task: Task, call: Call
    ) -> AbstractAsyncContextManager[AsyncIterator[StreamTaskResponse]]:
        """Opens `task` as a stream of events, in the order that the contract gives.

        Entering checks everything that can be refused before the provider is called, and completes
        `call.reply`; leaving, however it comes, closes the task at the provider. The deadline bounds the
        body of the `async with`, too.

        Raises:
            PomeloError: on entering, on the next event, or on leaving; what was yielded until then stands,
                and the stream is not complete.
        """
        ...


class ModelService(Protocol):
    """Tells what can be asked for."""

    async def list_models(self, call: Call) -> list[Model]:
        """The models that the caller's key may use, by name.

        Raises:
            PomeloError: invalid_api_key, store_unavailable.
        """
        ...

    async def get_model(self, name: str, call: Call) -> Model:
        """One model.

        Raises:
            PomeloError: invalid_api_key, unsupported_model, model_not_allowed (in this order), or
                store_unavailable.
        """
        ...


class MediaBytes(Protocol):
    """The bytes of a media file in pieces of at most 256 KiB."""

    def skip(self, size: int) -> None:
        """Skips the first `size` bytes; call it before the first piece is read."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def __anext__(self) -> bytes: ...


class MediaService(Protocol):
    """Takes in and gives out sounds and pictures."""

    async def upload_media(self, content_type: str, chunks: AsyncIterator[bytes], call: Call) -> Media:
        """Stores `chunks` as they come; nothing is kept when it raises or is cancelled.

        `content_type` may be empty: it is told from the bytes. The key is checked before the first chunk
        is asked for.

        Raises:
            PomeloError: invalid_api_key, payload_too_large, store_unavailable, or what `chunks` raises.
        """
        ...

    def download_media(
        self, media_id: str, signature: str, call: Call
    ) -> AbstractAsyncContextManager[tuple[Media, MediaBytes]]:
        """Opens a media file; gives its metadata and its bytes.

        `signature` is the query string of a signed link, which stands for the key; or empty.

        Raises:
            PomeloError: on entering: invalid_api_key (no signature, no good key), not_found,
                store_unavailable; later: provider_unavailable when the file is cut short.
        """
        ...


class AccountService(Protocol):
    """Tells the holder of a key of its account: the side of it, live or test, that the key is of."""

    async def get_account(self, call: Call) -> Account:
        """The plan, its limits, and the credits.

        Raises:
            PomeloError: invalid_api_key, model_not_allowed (its plan no longer exists), store_unavailable.
        """
        ...

    async def list_usage(self, request: ListUsageRequest, call: Call) -> ListUsageResponse:
        """A page of usage records, newest first; or sums of them.

        Raises:
            PomeloError: invalid_api_key, invalid_parameter, store_unavailable.
        """
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """All that a door needs."""

    tasks: TaskService
    models: ModelService
    media: MediaService
    accounts: AccountService
    access: AccessService
