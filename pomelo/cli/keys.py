"""`pomelo keys`: creates, lists, limits, rotates and revokes API keys."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pomelo.cli.operator import call_operator, list_pages
from pomelo.cli.terminal import (
    Commands,
    Config,
    Json,
    format_time,
    mode_name,
    parse_time,
    print_array,
    print_json,
    print_line,
    print_pages,
    reporting,
    unix_time,
    value_name,
)
from pomelo.money import format_credits, parse_credits

if TYPE_CHECKING:
    from pomelo.gen.admin.v1.admin_service_pb2 import Budget, Key

KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="The id of a key, from pomelo keys list.")]

_SPAN = re.compile(r"([1-9][0-9]{0,5})([mhdw])")
_BUDGETS = "5/day, 20/week, 50.5/month or 100/total"
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def commands() -> Commands:
    app = Commands("Create, list and revoke API keys.")
    app.add("create", create)
    app.add("list", list_keys)
    app.add("budget", budget)
    app.add("rotate", rotate)
    app.add("revoke", revoke)
    return app


def create(
    account: Annotated[str, typer.Argument(help="The account of the key.")] = "default",
    live: Annotated[
        bool, typer.Option("--live", help="A live key, for the providers. Default: a test key.")
    ] = False,
    models: Annotated[
        str | None, typer.Option(metavar="MODEL,…", help="The models it may use. Default: all.")
    ] = None,
    expires: Annotated[
        str,
        typer.Option(metavar="WHEN", help="When it expires: 30d, 12h or 2027-01-31T12:00Z. Default: never."),
    ] = "",
    name: Annotated[str, typer.Option(metavar="TEXT", help="A name for it in lists.")] = "",
    budget: Annotated[
        str, typer.Option(metavar="N/PERIOD", help=f"How many credits its tasks may cost: {_BUDGETS}.")
    ] = "",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Create a key and print it, alone on the last line. It can't be shown again."""
    from pomelo.accounts.modes import to_mode
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb
    from pomelo.protobuf.times import to_timestamp
    from pomelo.settings import load

    request = pb.CreateKeyRequest(account_id=account, mode=to_mode(live), name=name)
    if budget:
        request.budget.CopyFrom(parse_budget(budget, "--budget"))
    if models is not None:  # without a name, it is refused
        request.models.models[:] = [name.strip() for name in models.split(",") if name.strip()]
        request.models.SetInParent()
    if expires:
        request.expire_time.CopyFrom(to_timestamp(parse_expiry(expires, time.time())))
    names = {
        "account_id": "ACCOUNT",
        "models": "--models",
        "expire_time": "--expires",
        "name": "--name",
    }
    response = call_operator(
        load(config), lambda operator: operator.create_key(request), names=names, changes=True
    )
    _report_new(response, as_json)


def list_keys(
    account: Annotated[str, typer.Argument(help="The account of the keys. Default: all accounts.")] = "",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List keys, oldest first, without their secrets."""
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb
    from pomelo.settings import load

    query = pb.ListKeysRequest(account_id=account)
    found = list_pages(load(config), query, lambda operator: operator.list_keys(query))
    if as_json:
        print_array(listed_key(key) for page in found for key in page.keys)
        return
    pages = (
        [
            (
                key.id,
                key.name,
                key.account_id,
                mode_name(key.mode),
                ",".join(key.models.models) if key.HasField("models") else "all",
                _budget(key) or "none",
                _used(key) or "",
                format_time(key, "create_time") or "",
                format_time(key, "expire_time") or "never",
                format_time(key, "last_use_time") or "never",
                state(key),
            )
            for key in page.keys
        ]
        for page in found
    )
    header = (
        *("KEY_ID", "NAME", "ACCOUNT", "MODE", "MODELS", "BUDGET", "USED"),
        *("CREATED", "EXPIRES", "LAST_USE", "STATE"),
    )
    print_pages(header, pages, optional=("CREATED", "EXPIRES", "LAST_USE", "MODELS", "BUDGET"))


def budget(
    key_id: KeyId,
    budget: Annotated[str, typer.Argument(metavar="N/PERIOD", help=f"{_BUDGETS}, or none.")],
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Change or remove the budget of a key. It is how much the tasks of the key may cost in a period."""
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb
    from pomelo.settings import load

    limit = None if budget == "none" else parse_budget(budget, "N/PERIOD")
    request = pb.SetKeyBudgetRequest(id=key_id, budget=limit)
    names = {"id": "KEY_ID"}
    key = call_operator(load(config), lambda operator: operator.set_key_budget(request), names=names).key
    if as_json:
        print_json(_json(key))
    else:
        print_line(f"The budget of {key.id} of {key.account_id} is now {_budget(key) or 'none'}")


def rotate(
    key_id: KeyId,
    grace: Annotated[
        str,
        typer.Option(
            metavar="SPAN", help="How long the old key still works, such as 24h. Default: not at all."
        ),
    ] = "",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Replace a key with a new one that has the same properties. It is printed alone on the last line."""
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb
    from pomelo.settings import load

    request, names = pb.RotateKeyRequest(id=key_id), {"id": "KEY_ID", "grace": "--grace"}
    if grace:
        span = _SPAN.fullmatch(grace)
        if span is None:
            raise typer.BadParameter(f"{grace!r} is not a time span such as 24h or 7d", param_hint="--grace")
        request.grace.FromSeconds(int(span[1]) * _SECONDS[span[2]])
    response = call_operator(
        load(config), lambda operator: operator.rotate_key(request), names=names, changes=True
    )
    _report_new(response, as_json)


def revoke(key_id: KeyId, config: Config = None, as_json: Json = False) -> None:
    """Revoke a key, immediately and permanently."""
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb
    from pomelo.settings import load

    request, names = pb.RevokeKeyRequest(id=key_id), {"id": "KEY_ID"}
    key = call_operator(load(config), lambda operator: operator.revoke_key(request), names=names).key
    if as_json:
        print_json(_json(key))
    else:
        print_line(f"Revoked {key.id} of {key.account_id}")


def parse_expiry(text: str, now: float) -> float:
    """Returns Unix seconds of a span from `now` (m, h, d, w) or of an ISO date or time, UTC without a zone.

    Raises:
        typer.BadParameter: the text is neither, or the time is after the year 9999.
    """
    from pomelo.protobuf.times import MAX_SECONDS

    span = _SPAN.fullmatch(text)
    at = now + int(span[1]) * _SECONDS[span[2]] if span else parse_time(text)
    if at is None or at > MAX_SECONDS:
        raise typer.BadParameter(
            f"{text!r} is neither a time span such as 30d nor a time such as 2027-01-31T12:00Z, up to the "
            "year 9999",
            param_hint="--expires",
        )
    return at


def parse_budget(text: str, hint: str) -> Budget:
    """Returns the budget of text such as 5/day.

    Raises:
        typer.BadParameter: the text is not a budget.
    """
    from pomelo.accounts.budgets import PERIODS
    from pomelo.gen.admin.v1.admin_service_pb2 import Budget

    amount, _, period = text.partition("/")
    try:
        limit = parse_credits(amount)
        if limit:
            return Budget(limit_micros=limit, period=PERIODS[period])
    except (KeyError, ValueError):
        pass
    raise typer.BadParameter(f"{text!r} is no budget: {_BUDGETS}", param_hint=hint)


def _budget(key: Key) -> str | None:
    """Returns the budget of a key as text, None without one."""
    from pomelo.gen.admin.v1.admin_service_pb2 import BudgetPeriod

    if not key.HasField("budget"):
        return None
    return f"{format_credits(key.budget.limit_micros)}/{value_name(BudgetPeriod, key.budget.period)}"


def _used(key: Key) -> str | None:
    """Returns how many credits of a key's budget are used, as text; None without one."""
    return format_credits(key.budget_used_micros) if key.HasField("budget") else None


def _report_new(answer: Any, as_json: bool) -> None:
    key_id = answer.key.id
    with reporting(f"The key {key_id} was created", f"Replace it: pomelo keys rotate {key_id}"):
        _print_new(answer, as_json)


def _print_new(answer: Any, as_json: bool) -> None:
    if as_json:
        print_json(_json(answer.key) | {"key": answer.secret})
        return
    key = answer.key
    models = ", ".join(key.models.models) if key.HasField("models") else "all models"
    expires = format_time(key, "expire_time") or "never"
    print_line(f"Created a {mode_name(key.mode)} key of {key.account_id} for {models}. Expires: {expires}.")
    if limit := _budget(key):
        print_line(f"Its tasks may cost {limit}.")
    print_line("Store it now: it can't be shown again.")
    print_line(answer.secret)


def listed_key(key: Key) -> bytes:
    """Returns the JSON object of a key of a list, without its secret."""
    from pydantic_core import to_json

    # Not as a float: that could show an amount in exponential notation.
    return to_json(_json(key))[:-1] + b',"budget_used":' + (_used(key) or "null").encode() + b"}"


def _json(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "key",
        "name": key.name or None,
        "account": key.account_id,
        "mode": mode_name(key.mode),
        "models": list(key.models.models) if key.HasField("models") else None,
        "budget": _budget(key),
        "created": unix_time(key, "create_time"),
        "expires": unix_time(key, "expire_time"),
        "revoked": unix_time(key, "revoke_time"),
        "last_use": unix_time(key, "last_use_time"),
        "state": state(key),
    }


def state(key: Key) -> str:
    """Returns revoked, expired or active."""
    if key.HasField("revoke_time"):
        return "revoked"
    if key.HasField("expire_time") and key.expire_time.ToNanoseconds() <= time.time_ns():
        return "expired"
    return "active"
