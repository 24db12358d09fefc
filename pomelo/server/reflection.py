"""Server reflection: clients such as grpcurl ask a server for its services and their messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

if TYPE_CHECKING:
    from grpc_reflection.v1alpha.reflection import ReflectionServicer

SERVICE = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name
"""The full name of the service."""


class Reflection:
    """Describes services and the service of reflection itself."""

    def __init__(self, services: Sequence[str]) -> None:
        self._names = (*services, SERVICE)

    def answers(self, request: ServerReflectionRequest) -> Iterator[ServerReflectionResponse]:
        """Yields the answers to one request."""
        yield from self._library.ServerReflectionInfo(iter((request,)), None)

    @cached_property
    def _library(self) -> ReflectionServicer:
        # It takes 25 ms to import, and few servers are asked.
        from grpc_reflection.v1alpha.reflection import ReflectionServicer

        return ReflectionServicer(self._names)


class OpenReflection:
    """Serves reflection to whoever can connect."""

    def __init__(self, services: Sequence[str]) -> None:
        self._reflection = Reflection(services)

    async def ServerReflectionInfo(
        self, requests: AsyncIterator[ServerReflectionRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ServerReflectionResponse]:
        """Answers each request of a stream."""
        async for request in requests:
            for answer in self._reflection.answers(request):
                yield answer
