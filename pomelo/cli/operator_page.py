"""The operator's page at the admin address: its files, and the accounts. The rest of it is in /metrics."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from yarl import URL

from pomelo.addresses import is_loopback
from pomelo.errors import PomeloError
from pomelo.gen.admin.v1.admin_service_pb2 import ListAccountsRequest

if TYPE_CHECKING:
    from aiohttp import web

    from pomelo.accounts.operator import LocalOperator
    from pomelo.telemetry.admin import Page

_PAGE_SIZE = 100

_ELSEWHERE = (
    "Accounts are shown to this machine alone: open http://127.0.0.1:9090 on it, or through a tunnel such as "
    "ssh -L 9090:127.0.0.1:9090\n"
)


class OperatorPage:
    """The pages of the admin server besides metrics and health. `operator` is set once the application runs;
    a gateway has none, and no accounts."""

    def __init__(self) -> None:
        self.operator: LocalOperator | None = None

    def find(self, path: str) -> Page | None:
        """Returns the page at a path, None if the path has no page."""
        if path == "/accounts" and self.operator is not None:
            return partial(_respond_with_accounts, self.operator)
        if path == "/":
            return partial(_respond_with_file, "operator.html")
        if path.startswith("/page/"):
            return partial(_respond_with_file, path.removeprefix("/page/"))
        return None


async def _respond_with_file(name: str, request: web.BaseRequest) -> web.Response:
    from aiohttp import web

    from gateway.page import OPERATOR_FILES
    from gateway.static_files import PAGE_HEADERS

    file = await OPERATOR_FILES.find(name)
    if file is None:
        return web.Response(status=404, text="Not found. Use /\n")
    headers = {**PAGE_HEADERS, "ETag": file.tag, "Content-Type": file.content_type}
    return web.Response(body=file.data, headers=headers)


async def _respond_with_accounts(operator: LocalOperator, request: web.BaseRequest) -> web.Response:
    """Returns a page of the accounts and their credits as JSON."""
    from aiohttp import web
    from pydantic_core import to_json

    from pomelo.cli.accounts import account_json

    if not _is_local(request):
        return web.Response(status=403, text=_ELSEWHERE)
    query = ListAccountsRequest(page_size=_PAGE_SIZE, page_token=request.query.get("page_token", ""))
    try:
        page = await operator.list_accounts(query)
    except PomeloError as error:
        return web.Response(status=error.row.http, text=f"{error.message}\n")
    accounts = b",".join(map(account_json, page.accounts))
    body = b'{"data":[%b],"next_page_token":%b}' % (accounts, to_json(page.next_page_token or None))
    return web.Response(body=body, content_type="application/json")


def _is_local(request: web.BaseRequest) -> bool:
    """Returns whether a request comes from this machine, or through a tunnel to it, and is addressed to it. A
    page of another site can call this server through a name of its own, but then that is the `Host`."""
    try:
        host = URL(f"http://{request.host}").host or ""
    except ValueError:
        return False
    return is_loopback(host) and is_loopback(request.remote or "")
