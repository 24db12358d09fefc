"""`pomelo doctor`: checks the store, its archive, and what its keys and accounts need."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pomelo.cli.findings import Finding
from pomelo.cli.server_checks import TIMEOUT
from pomelo.cli.terminal import counted, explain

if TYPE_CHECKING:
    from pomelo.gen.admin.v1.admin_service_pb2 import Account, Key
    from pomelo.providers.registry import Registry
    from pomelo.settings import Settings, SettingsError


def check_store(settings: Settings, served: bool, registry: Registry | SettingsError) -> Iterator[Finding]:
    """Checks the store, its keys and accounts, through the running server if there is one."""
    from pomelo.cli.keys import state
    from pomelo.cli.operator import find_missing, has_database, list_pages
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb
    from pomelo.gen.v1.usage_pb2 import Mode
    from pomelo.stores import check_store as check_url

    if settings.uses_sqlite and not served and not has_database(settings):
        yield Finding("store", "off", "empty: no keys yet")
        return
    name = "SQLite" if settings.uses_sqlite else settings.store.partition(":")[0]
    of_keys, of_accounts = pb.ListKeysRequest(), pb.ListAccountsRequest()
    try:
        missing = "" if settings.uses_sqlite or served else find_missing(settings)
        if not settings.uses_sqlite:  # its keys may be readable while it refuses writes
            archive = settings.archive_url() if missing else ""
            asyncio.run(check_url(settings.store_url(), archive=archive))
        if missing:
            yield Finding("store", "off", f"{name} can be reached, and was not read. {missing}")
            return
        key_pages = list_pages(settings, of_keys, lambda operator: operator.list_keys(of_keys))
        keys = [key for page in key_pages for key in page.keys]
        account_pages = list_pages(
            settings, of_accounts, lambda operator: operator.list_accounts(of_accounts)
        )
        accounts = [account for page in account_pages for account in page.accounts]
    except Exception as error:
        line = _explain(settings, error)
        if line == str(registry):
            line = "can't be opened without the providers: see below"
        yield Finding("store", "broken", line)
        return
    usable = [key for key in keys if state(key) == "active"]
    yield from _secret(settings, [key for key in usable if key.previous_secret])
    yield Finding("store", "ok", f"{name}, {counted(len(keys), 'key')}, {len(usable)} usable")
    if not settings.uses_sqlite:
        yield _archive(settings)
    yield _plans(settings, accounts)
    yield _credits(accounts, {key.account_id for key in usable if key.mode == Mode.MODE_LIVE})


def _explain(settings: Settings, error: Exception) -> str:
    """Returns why the store or the archive can't be used. A running server says only that it can't."""
    from pomelo.stores import check_store as check_url
    from pomelo.stores.base import StoreError

    if getattr(error, "code", "") == "store_unavailable" and not settings.uses_sqlite:
        try:
            asyncio.run(check_url(settings.store_url(), archive=settings.archive_url()))
        except StoreError as found:
            return explain(found)
    return explain(error)


def _archive(settings: Settings) -> Finding:
    """Reads from the archive, through the running server if there is one: tasks go on without it."""
    from pomelo.cli.operator import call_operator
    from pomelo.gen.admin.v1.admin_service_pb2 import ListUsageRequest
    from pomelo.stores.accounts import DEFAULT_ACCOUNT

    # Of one account: first, the records that are still in Redis are moved to the archive.
    request = ListUsageRequest(account_id=DEFAULT_ACCOUNT, page_size=1)
    try:
        call_operator(settings, lambda operator: operator.list_usage(request), TIMEOUT)
    except Exception as error:
        detail = f"usage records can't be read from POMELO_ARCHIVE: {_explain(settings, error)}"
        return Finding("archive", "broken", detail)
    return Finding("archive", "ok", "usage records can be read")


def _secret(settings: Settings, outdated: Sequence[Key]) -> Iterator[Finding]:
    """Reports, while the root secret is rotated, whether the previous one is still needed."""
    if not settings.secret_previous:
        return
    if not outdated:
        yield Finding("secret", "ok", "no active key needs POMELO_SECRET_PREVIOUS: you may remove it")
        return
    one = len(outdated) == 1
    yield Finding(
        "secret",
        "warning",
        f"{counted(len(outdated), 'active key')} still {'uses' if one else 'use'} the previous secret: "
        f"{_join(key.id for key in outdated)}. Keep POMELO_SECRET_PREVIOUS until "
        f"{'it is' if one else 'they are'} used, or run: pomelo keys rotate {outdated[0].id}",
    )


def _plans(settings: Settings, accounts: Sequence[Account]) -> Finding:
    blocked = [account for account in accounts if not account.HasField("limits")]
    if blocked:
        name, plan = blocked[0].id, blocked[0].plan
        return Finding(
            "plans",
            "broken",
            f"{_join(account.id for account in blocked)}: blocked, since there is no plan {plan}. "
            f"Add [plans.{plan}] to pomelo.toml, or run: pomelo accounts plan {name} PLAN",
        )
    own = f", {counted(len(settings.plans), 'plan')} of pomelo.toml" if settings.plans else ""
    return Finding("plans", "ok", f"{counted(len(accounts), 'account')} on an existing plan{own}")


def _credits(accounts: Sequence[Account], live: Collection[str]) -> Finding:
    """Reports accounts with live keys that can't pay. It is normal that an account has spent its credits."""
    empty = [account.id for account in accounts if account.id in live and account.live.available_micros <= 0]
    if empty:
        return Finding(
            "credits",
            "off",
            f"no live credits, but live keys: {_join(empty)}. Run: pomelo accounts grant {empty[0]} CREDITS",
        )
    if not live:
        return Finding("credits", "off", "no live key yet: test keys spend test credits")
    return Finding("credits", "ok", "every account with a live key has live credits")


def _join(names: Iterable[str]) -> str:
    """Returns the first three names, and how many more there are."""
    first = list(names)
    more = f" and {len(first) - 3} more" if len(first) > 3 else ""
    return ", ".join(first[:3]) + more
