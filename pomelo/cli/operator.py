"""How the operator's commands ask: the running server through its socket, or a servicer made for a moment.

`keys`, `accounts`, `usage`, `audit` and `doctor` ask here. Where no server runs, the store is opened and the
same servicer asked, so that the answer is the same.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomelo.cli.terminal import FailureError

if TYPE_CHECKING:
    from pomelo.settings import Settings

TIMEOUT = 30.0
"""Seconds that an answer may take."""

_MAKING = frozenset({"CreateKey", "CreateAccount"})
"""What may be the first thing that is done with a data folder."""


def asked(config: Path | None, method: str, request: Any, timeout: float = TIMEOUT) -> Any:
    """As `ask`, under the settings of a command."""
    from pomelo.settings import load

    return ask(load(config), method, request, timeout)


def ask(settings: "Settings", method: str, request: Any, timeout: float = TIMEOUT) -> Any:
    """What AdminService answers: the server's, or one that is made here for a moment.

    Raises:
        PomeloError: a refusal; SettingsError, StoreError: the data folder can't be used.
    """
    from pomelo.cli.client import is_served, operator

    if is_served(settings.admin_socket):
        from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceStub

        with operator(settings.admin_socket) as channel:
            return getattr(AdminServiceStub(channel), method)(request, timeout=timeout)
    kept_here = settings.store_url().startswith("sqlite:")
    if kept_here and method not in _MAKING and not settings.data.exists():
        raise FailureError(f"There is no data folder {settings.data}. Set POMELO_DATA, or run: pomelo serve")
    import asyncio

    return asyncio.run(_ask_here(settings, method, request))


async def _ask_here(settings: "Settings", method: str, request: Any) -> Any:
    from pomelo.accounts import AccountOffice
    from pomelo.admission.keys import Keyring
    from pomelo.app import find_plans, find_providers, store_of
    from pomelo.metering.usage import UsageDesk
    from pomelo.server.admin import AdminServicer

    catalog = find_providers(settings).catalog
    plans = find_plans(settings, catalog)
    secret = settings.root_secret()
    async with store_of(settings) as store:
        servicer = AdminServicer(
            store,
            Keyring(store, secret),
            AccountOffice(store, plans),
            UsageDesk(store, secret),
            catalog.models,
        )
        name = re.sub(r"(?<!^)([A-Z])", r"_\1", method).lower()
        return await getattr(servicer, name)(request)
