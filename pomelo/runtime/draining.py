"""Graceful shutdown of the services: counts running calls, refuses new ones, and ends the remaining ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.runtime.process import CancelScope
from pomelo.service import (
    AccessService,
    AccountService,
    MediaService,
    ModelService,
    Services,
    TaskService,
    Visit,
)

P = ParamSpec("P")
T = TypeVar("T")


class Draining:
    """The running calls of services, and whether new ones are accepted. Needs a running event loop."""

    def __init__(self) -> None:
        self.scopes: dict[CancelScope, tuple[object, ...]] = {}
        """Of the running calls, with their arguments."""
        self.draining = False
        self._idle = asyncio.Event()

    def guard(self, services: Services) -> Services:
        """Returns the same services with every call counted."""
        return Services(
            tasks=_Tasks(services.tasks, self),
            models=_Models(services.models, self),
            media=_Media(services.media, self),
            accounts=_Accounts(services.accounts, self),
            access=_Access(services.access, self),
        )

    def drain(self) -> None:
        """Refuses every new call with shutting_down from now on; running ones continue."""
        self.draining = True

    async def idle(self) -> None:
        """Returns when no call is running."""
        while self.scopes:
            self._idle.clear()
            await self._idle.wait()

    def stop(self) -> None:
        """Drains, and ends every running call with shutting_down, except those whose task is being charged:
        their callers would pay, and send it again."""
        self.draining = True
        for scope, arguments in self.scopes.items():
            if not any(isinstance(one, Call) and one.settling for one in arguments):
                scope.expire()

    def enter(self, *arguments: object) -> CancelScope:
        """Counts a call of the current asyncio task until `leave`. `arguments` are those of the service.

        Raises:
            PomeloError: shutting_down.
        """
        if self.draining:
            raise PomeloError("shutting_down")
        scope = CancelScope().start()
        self.scopes[scope] = arguments
        return scope

    def leave(self, scope: CancelScope, error: BaseException | None) -> None:
        """Ends a call that `error` ends.

        Raises:
            PomeloError: shutting_down; the call was ended by `stop`.
        """
        self.scopes.pop(scope, None)
        if not self.scopes:
            self._idle.set()
        if scope.ended_by(error):
            raise PomeloError("shutting_down") from error

    def counted(self, method: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """Returns the method with each of its calls counted."""

        @wraps(method)
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            scope = self.enter(*args)
            try:
                result = await method(*args, **kwargs)
            except BaseException as error:
                self.leave(scope, error)
                raise
            self.leave(scope, None)
            return result

        return call

    def counted_context(
        self, method: Callable[P, AbstractAsyncContextManager[T]]
    ) -> Callable[P, AbstractAsyncContextManager[T]]:
        """Returns the method with each of the contexts that it opens counted."""

        @wraps(method)
        @asynccontextmanager
        async def call(*args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
            scope = self.enter(*args)
            try:
                async with method(*args, **kwargs) as value:
                    yield value
            except BaseException as error:
                self.leave(scope, error)
                raise
            self.leave(scope, None)

        return call


class _Access:
    def __init__(self, access: AccessService, draining: Draining) -> None:
        self._access = access
        self._draining = draining

    async def admit(self, call: Call) -> Visit:
        if self._draining.draining:
            raise PomeloError("shutting_down")
        return await self._access.admit(call)


class _Tasks:
    def __init__(self, tasks: TaskService, draining: Draining) -> None:
        self.run_task = draining.counted(tasks.run_task)
        self.stream_task = draining.counted_context(tasks.stream_task)


class _Models:
    def __init__(self, models: ModelService, draining: Draining) -> None:
        self.list_models = draining.counted(models.list_models)
        self.get_model = draining.counted(models.get_model)


class _Media:
    def __init__(self, media: MediaService, draining: Draining) -> None:
        self.upload_media = draining.counted(media.upload_media)
        self.download_media = draining.counted_context(media.download_media)


class _Accounts:
    def __init__(self, accounts: AccountService, draining: Draining) -> None:
        self.get_account = draining.counted(accounts.get_account)
        self.list_usage = draining.counted(accounts.list_usage)
        self.sum_usage = draining.counted(accounts.sum_usage)
