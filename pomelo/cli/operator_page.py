"""The operator's page at the admin address: its files, the accounts and keys. The rest is in /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from pomelo.cli.client import is_served
from pomelo.errors import PomeloError
from pomelo.gen.admin.v1.admin_service_pb2 import ListAccountsRequest, ListKeysRequest
from pomelo.network.addresses import host_of, is_loopback

if TYPE_CHECKING:
    from aiohttp import web

    from pomelo.accounts.operator import LocalOperator
    from pomelo.settings import Settings
    from pomelo.telemetry.admin import Page
    from pomelo.telemetry.metrics import Metrics
    from pomelo.telemetry.readiness import Readiness

ENDED_INTERVAL = 0.1
"""Seconds between two looks at whether the other workers have ended."""

_PAGE_SIZE = 100

_FORWARDED = ("Forwarded", "Via", "X-Forwarded-For", "X-Real-IP")
"""Headers of proxies: a request with one of them may come from anywhere."""

_ELSEWHERE = (
    "Accounts and keys are shown to this machine alone: open http://127.0.0.1:9090 on it, or through a "
    "tunnel such as ssh -L 9090:127.0.0.1:9090\n"
)


class OperatorPage:
    """The pages of the admin server besides metrics and health. They only read. `operator` is set once the
    application runs; a gateway has none, and no accounts."""

    def __init__(self) -> None:
        self.operator: LocalOperator | None = None

    def find(self, path: str) -> Page | None:
        """Returns the page at a path, None if the path has no page."""
        if path in _LISTS and self.operator is not None:
            return partial(_respond_with_list, _LISTS[path], self.operator)
        if path == "/":
            return partial(_respond_with_file, "operator.html")
        if path.startswith("/page/"):
            return partial(_respond_with_file, path.removeprefix("/page/"))
        return None


@asynccontextmanager
async def open_admin(
    settings: Settings, metrics: Metrics, readiness: Readiness, page: OperatorPage, worker: int | None = None
) -> AsyncIterator[str]:
    """Serves metrics, health and the operator's page, and yields the bound address, empty if they are off.
    `worker` is the number of this process among several: the first one serves the metrics of all, which the
    others report to it, until they have ended."""
    from pomelo.telemetry.admin import open_admin as serve_admin
    from pomelo.telemetry.exposition import Exposition, open_worker_socket, worker_socket

    if worker and settings.admin:
        socket = worker_socket(settings.data, worker)
        async with open_worker_socket(Exposition(metrics, worker), socket) as opened:
            yield opened
        return
    address = "" if worker else settings.admin
    shared = worker is not None
    others = {n: worker_socket(settings.data, n) for n in range(1, settings.workers)} if shared else {}
    exposition = Exposition(metrics, 0, others)
    async with serve_admin(address, exposition, readiness, find_page=page.find, reuse_port=shared) as opened:
        yield opened
        # While they drain, nothing else can report them.
        while address and any(map(is_served, others.values())):  # noqa: ASYNC110 (of other processes)
            await asyncio.sleep(ENDED_INTERVAL)


async def _respond_with_file(name: str, request: web.BaseRequest) -> web.Response:
    from aiohttp import web

    from gateway.page import OPERATOR_FILES
    from gateway.static_files import PAGE_HEADERS

    file = await OPERATOR_FILES.find(name)
    if file is None:
        return web.Response(status=404, text="Not found. Use /\n")
    headers = {**PAGE_HEADERS, "ETag": file.tag, "Content-Type": file.content_type}
    return web.Response(body=file.data, headers=headers)


async def _list_accounts(operator: LocalOperator, query: Mapping[str, str]) -> tuple[Iterable[bytes], str]:
    from pomelo.cli.accounts import account_json

    page = await operator.list_accounts(
        ListAccountsRequest(page_size=_PAGE_SIZE, page_token=query.get("page_token", ""))
    )
    return map(account_json, page.accounts), page.next_page_token


async def _list_keys(operator: LocalOperator, query: Mapping[str, str]) -> tuple[Iterable[bytes], str]:
    from pomelo.cli.keys import listed_key

    request = ListKeysRequest(
        account_id=query.get("account_id", ""), page_size=_PAGE_SIZE, page_token=query.get("page_token", "")
    )
    page = await operator.list_keys(request)
    return map(listed_key, page.keys), page.next_page_token


_List = Callable[["LocalOperator", Mapping[str, str]], Awaitable[tuple[Iterable[bytes], str]]]
"""Returns a page of JSON objects, and the token of the next page."""

_LISTS: Mapping[str, _List] = {"/accounts": _list_accounts, "/keys": _list_keys}


async def _respond_with_list(read: _List, operator: LocalOperator, request: web.BaseRequest) -> web.Response:
    """Returns a page of a list as JSON, to this machine alone."""
    from aiohttp import web
    from pydantic_core import to_json

    if not _is_local(request):
        return web.Response(status=403, text=_ELSEWHERE)
    try:
        rows, token = await read(operator, request.query)
    except PomeloError as error:
        return web.Response(status=error.row.http, text=f"{error.message}\n")
    body = b'{"data":[%b],"next_page_token":%b}' % (b",".join(rows), to_json(token or None))
    return web.Response(body=body, content_type="application/json")


def _is_local(request: web.BaseRequest) -> bool:
    """Returns whether a request comes from this machine, or through a tunnel to it, and is addressed to it. A
    page of another site can call this server through a name of its own, but then that is the `Host`. A proxy
    on this machine is found by the headers that it adds, if it adds any."""
    if any(name in request.headers for name in _FORWARDED):
        return False
    host = host_of(request.headers.get("Host", ""))
    return is_loopback(host) and is_loopback(request.remote or "")
