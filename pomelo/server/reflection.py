"""Server reflection: clients such as grpcurl ask a server for its services and their messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import grpc
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import Default, DescriptorPool
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

if TYPE_CHECKING:
    from grpc_reflection.v1alpha.reflection import ReflectionServicer

SERVICE = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name
"""The full name of the service."""


class Reflection:
    """Describes services, the service of reflection itself, and the details of errors; no other service that
    this process has, such as the operator's."""

    def __init__(self, services: Sequence[str]) -> None:
        self._names = (*services, SERVICE)

    def answers(self, request: ServerReflectionRequest) -> Iterator[ServerReflectionResponse]:
        """Yields the answers to one request."""
        asked = request
        service, _, method = request.file_containing_symbol.rpartition(".")
        if service in self._names and method in self._pool.FindServiceByName(service).methods_by_name:
            # The pool finds no methods, only what has them.
            asked = ServerReflectionRequest(host=request.host, file_containing_symbol=service)
        for answer in self._library.ServerReflectionInfo(iter((asked,)), None):
            answer.original_request.CopyFrom(request)
            yield answer

    @cached_property
    def _pool(self) -> DescriptorPool:
        return _pool(self._names)

    @cached_property
    def _library(self) -> ReflectionServicer:
        # It takes 25 ms to import, and few servers are asked.
        from grpc_reflection.v1alpha.reflection import ReflectionServicer

        return ReflectionServicer(self._names, self._pool)


def _pool(services: Sequence[str]) -> DescriptorPool:
    """Returns a pool with the files of services and of the details of errors, and what they import."""
    pool = DescriptorPool()
    added: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name not in added:
            added.add(file.name)
            for imported in file.dependencies:
                add(imported)
            pool.AddSerializedFile(file.serialized_pb)

    # Clients decode the details of an error by their names.
    for details in (error_details_pb2, status_pb2):
        add(details.DESCRIPTOR)
    for service in services:
        add(Default().FindFileContainingSymbol(service))
    return pool


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
