"""Services that come to an end in good order.

`pomelo.app` puts one in front of the engine, and one in front of a remote server: the doors hold what it
gives. It counts the calls that run, refuses new ones while it drains, and ends what is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType

from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.account_service_pb2 import Account, ListUsageRequest, ListUsageResponse
from pomelo.gen.v1.media_pb2 import Media
from pomelo.gen.v1.model_service_pb2 import Model
from pomelo.gen.v1.task_pb2 import Task, TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.service import (
    AccessService,
    AccountService,
    MediaBytes,
    MediaService,
    ModelService,
    Services,
    TaskService,
    Visit,
)


class Draining:
    """What runs, and whether more may. To be made in the running event loop."""

    def __init__(self) -> None:
        self.scopes: set[asyncio.Timeout] = set()
        self.draining = False
        self._idle = asyncio.Event()

    def guard(self, services: Services) -> Services:
        """The same services, counted."""
        return Services(
            tasks=_Tasks(services.tasks, self),
            models=_Models(services.models, self),
            media=_Media(services.media, self),
            accounts=_Accounts(services.accounts, self),
            access=_Access(services.access, self),
        )

    @property
    def running(self) -> int:
        """How many calls run."""
        return len(self.scopes)

    def drain(self) -> None:
        """From now on every call is refused with shutting_down; running ones go on."""
        self.draining = True

    async def idle(self) -> None:
        """Returns when no call runs."""
        while self.scopes:
            self._idle.clear()
            await self._idle.wait()

    def stop(self) -> None:
        """Drains, and ends every running call with shutting_down."""
        self.draining = True
        now = asyncio.get_running_loop().time()
        for scope in self.scopes:
            if not scope.expired():
                scope.reschedule(now)

    def left(self, scope: asyncio.Timeout) -> None:
        """A call has ended."""
        self.scopes.discard(scope)
        if not self.scopes:
            self._idle.set()


class _Counted:
    """One call: an async context manager around all that it does.

    Raises:
        PomeloError: shutting_down; on entering or, when it is ended, on leaving.
    """

    __slots__ = ("_draining", "_scope")

    def __init__(self, draining: Draining) -> None:
        self._draining = draining
        self._scope = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        if self._draining.draining:
            raise PomeloError("shutting_down")
        await self._scope.__aenter__()
        self._draining.scopes.add(self._scope)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draining.left(self._scope)
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError:
            raise PomeloError("shutting_down") from error


class _Access:
    """AccessService; refuses while the server drains."""

    def __init__(self, inner: AccessService, draining: Draining) -> None:
        self._inner = inner
        self._draining = draining

    async def admit(self, call: Call) -> Visit:
        """See the port."""
        if self._draining.draining:
            raise PomeloError("shutting_down")
        return await self._inner.admit(call)


class _Tasks:
    """TaskService, counted."""

    def __init__(self, inner: TaskService, draining: Draining) -> None:
        self._inner = inner
        self._draining = draining

    async def run_task(self, task: Task, call: Call) -> TaskResult:
        """See the port."""
        async with _Counted(self._draining):
            return await self._inner.run_task(task, call)

    @asynccontextmanager
    async def stream_task(self, task: Task, call: Call) -> AsyncIterator[AsyncIterator[StreamTaskResponse]]:
        """See the port."""
        async with _Counted(self._draining), self._inner.stream_task(task, call) as events:
            yield events


class _Models:
    """ModelService, counted."""

    def __init__(self, inner: ModelService, draining: Draining) -> None:
        self._inner = inner
        self._draining = draining

    async def list_models(self, call: Call) -> list[Model]:
        """See the port."""
        async with _Counted(self._draining):
            return await self._inner.list_models(call)

    async def get_model(self, name: str, call: Call) -> Model:
        """See the port."""
        async with _Counted(self._draining):
            return await self._inner.get_model(name, call)


class _Media:
    """MediaService, counted."""

    def __init__(self, inner: MediaService, draining: Draining) -> None:
        self._inner = inner
        self._draining = draining

    async def upload_media(self, content_type: str, chunks: AsyncIterator[bytes], call: Call) -> Media:
        """See the port."""
        async with _Counted(self._draining):
            return await self._inner.upload_media(content_type, chunks, call)

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call
    ) -> AsyncIterator[tuple[Media, MediaBytes]]:
        """See the port."""
        async with _Counted(self._draining), self._inner.download_media(media_id, signature, call) as medium:
            yield medium


class _Accounts:
    """AccountService, counted."""

    def __init__(self, inner: AccountService, draining: Draining) -> None:
        self._inner = inner
        self._draining = draining

    async def get_account(self, call: Call) -> Account:
        """See the port."""
        async with _Counted(self._draining):
            return await self._inner.get_account(call)

    async def list_usage(self, request: ListUsageRequest, call: Call) -> ListUsageResponse:
        """See the port."""
        async with _Counted(self._draining):
            return await self._inner.list_usage(request, call)
