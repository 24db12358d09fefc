"""`pomelo accounts`: creates accounts, changes their credits and plans, and disables them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pomelo.cli.operator import call_operator, list_pages
from pomelo.cli.terminal import (
    Commands,
    Config,
    Json,
    counted,
    format_time,
    print_array,
    print_json,
    print_line,
    print_pages,
    reporting,
    unix_time,
)
from pomelo.money import format_credits, parse_credits

if TYPE_CHECKING:
    from pomelo.gen.admin.v1.admin_service_pb2 import Account
    from pomelo.service import Operator

Name = Annotated[str, typer.Argument(metavar="NAME", help="An account, from pomelo accounts list.")]

_NAMES = {
    **{"id": "NAME", "account_id": "NAME", "plan": "--plan", "live_micros": "--credits", "note": "--note"},
    **{"grant_id": "--id", "adjustment_id": "--id", "credit_limit_micros": "--limit"},
}
"""The fields of requests on the command line. An amount and a plan have other names in some commands."""

_PLANS = "free, pro, scale, unlimited, or one of pomelo.toml"

_LIMITS: Mapping[str, Callable[[int], str]] = {
    "requests_per_minute": lambda number: f"{counted(number, 'request')} a minute",
    "concurrent_requests": lambda number: f"{number:,} concurrent",
    "tokens_per_minute": lambda number: f"{counted(number, 'token')} a minute",
}


def commands() -> Commands:
    app = Commands("Create accounts, change their credits and plans, disable them.")
    app.add("create", create)
    app.add("list", list_accounts)
    app.add("show", show)
    app.add("grant", grant)
    # An amount below 0 is not an option.
    app.add("adjust", adjust, context_settings={"ignore_unknown_options": True})
    app.add("postpaid", postpaid)
    app.add("plan", plan)
    app.add("disable", disable)
    app.add("enable", enable)
    return app


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, dots, dashes, underscores.")],
    plan: Annotated[str, typer.Option(metavar="PLAN", help=f"Its plan: {_PLANS}. Default: free.")] = "",
    credits: Annotated[  # noqa: A002 - the name of the option
        str,
        typer.Option(
            metavar="N", show_default=False, help="Initial live credits, such as 10 or 2.5. Default: none."
        ),
    ] = "0",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Create an account. It starts with 100 test credits."""
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb

    request = pb.CreateAccountRequest(id=name, plan=plan, live_micros=_micros(credits, "--credits"))
    _request(config, as_json, lambda operator: operator.create_account(request), creates=True)


def list_accounts(config: Config = None, as_json: Json = False) -> None:
    """List accounts by name, with their available credits."""
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb
    from pomelo.settings import load

    query = pb.ListAccountsRequest()
    found = list_pages(load(config), query, lambda operator: operator.list_accounts(query))
    if as_json:
        print_array(account_json(account) for page in found for account in page.accounts)
        return
    pages = (
        [
            (
                account.id,
                _plan(account),
                format_credits(account.live.available_micros),
                format_credits(account.test.available_micros),
                format_time(account, "create_time") or "",
            )
            for account in page.accounts
        ]
        for page in found
    )
    print_pages(("NAME", "PLAN", "CREDITS", "TEST_CREDITS", "CREATED"), pages, optional=("CREATED",))


def show(name: Name, config: Config = None, as_json: Json = False) -> None:
    """Show the plan, the limits and the credits of an account."""
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb
    from pomelo.settings import load

    request = pb.GetAccountRequest(id=name)
    response = call_operator(load(config), lambda operator: operator.get_account(request), names=_NAMES)
    _print(response.account, as_json)


def grant(
    name: Name,
    credits: Annotated[  # noqa: A002 - the name of the argument
        str, typer.Argument(metavar="CREDITS", help="Credits, such as 10 or 2.5; at most 6 decimal places.")
    ],
    test: Annotated[bool, typer.Option("--test", help="Grant test credits. Default: live credits.")] = False,
    note: Annotated[str, typer.Option(metavar="TEXT", help="A note for the records.")] = "",
    once: Annotated[
        str, typer.Option("--id", metavar="ID", help="Your own id of the grant: repeating it adds nothing.")
    ] = "",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Grant credits to an account. To take credits back, use adjust."""
    from pomelo.accounts.modes import to_mode
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb

    micros = _micros(credits, "CREDITS")
    if not micros:
        raise typer.BadParameter("must be more than 0", param_hint="CREDITS")
    request = pb.GrantCreditsRequest(
        account_id=name, amount_micros=micros, mode=to_mode(not test), note=note, grant_id=once
    )
    _request(config, as_json, lambda operator: operator.grant_credits(request), amount_micros="CREDITS")


def adjust(
    name: Name,
    amount: Annotated[
        str, typer.Argument(metavar="AMOUNT", help="Credits to add, or below 0 to take back, such as -90.")
    ],
    note: Annotated[str, typer.Option(metavar="TEXT", help="The reason, for the records. Required.")] = "",
    test: Annotated[bool, typer.Option("--test", help="Test credits. Default: live credits.")] = False,
    once: Annotated[
        str,
        typer.Option("--id", metavar="ID", help="Your own id of the change: repeating it changes nothing."),
    ] = "",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Correct the credits of an account. At most the available credits can be taken back."""
    from pomelo.accounts.modes import to_mode
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb

    if not note.strip():
        raise typer.BadParameter("give the reason", param_hint="--note")
    micros = _micros(amount.removeprefix("-"), "AMOUNT")
    if not micros:
        raise typer.BadParameter("must not be 0", param_hint="AMOUNT")
    request = pb.AdjustCreditsRequest(
        account_id=name,
        amount_micros=-micros if amount.startswith("-") else micros,
        mode=to_mode(not test),
        note=note,
        adjustment_id=once,
    )
    _request(config, as_json, lambda operator: operator.adjust_credits(request), amount_micros="AMOUNT")


def postpaid(
    name: Name,
    limit: Annotated[
        str,
        typer.Option(metavar="N", help="Credits it may spend beyond those granted. 0: it is prepaid again."),
    ],
    test: Annotated[bool, typer.Option("--test", help="In test mode. Default: in live mode.")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Set how much an account may spend beyond its grants. A payment is a grant."""
    from pomelo.accounts.modes import to_mode
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb

    request = pb.SetCreditLimitRequest(
        account_id=name, credit_limit_micros=_micros(limit, "--limit"), mode=to_mode(not test)
    )
    _request(config, as_json, lambda operator: operator.set_credit_limit(request))


def disable(name: Name, config: Config = None, as_json: Json = False) -> None:
    """Refuse all calls with the keys of an account. Tasks that run end as usual."""
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb

    request = pb.DisableAccountRequest(account_id=name)
    _request(config, as_json, lambda operator: operator.disable_account(request))


def enable(name: Name, config: Config = None, as_json: Json = False) -> None:
    """Let the keys of a disabled account work again."""
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb

    request = pb.EnableAccountRequest(account_id=name)
    _request(config, as_json, lambda operator: operator.enable_account(request))


def plan(
    name: Name,
    plan: Annotated[str, typer.Argument(metavar="PLAN", help=f"The new plan: {_PLANS}.")],
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Change the plan of an account."""
    from pomelo.gen.admin.v1 import admin_service_pb2 as pb

    request = pb.SetAccountPlanRequest(account_id=name, plan=plan)
    _request(config, as_json, lambda operator: operator.set_account_plan(request), plan="PLAN")


def _request(
    config: Path | None,
    as_json: bool,
    request: Callable[[Operator], Awaitable[Any]],
    *,
    creates: bool = False,
    **names: str,
) -> None:
    """Runs a request that changes an account, and prints the account. `creates` as in `call_operator`, and
    `names` too, besides those of `_NAMES`."""
    from pomelo.settings import load

    response = call_operator(load(config), request, names=_NAMES | names, creates=creates, changes=True)
    with reporting(f"The account {response.account.id} was changed"):
        _print(response.account, as_json)


def _micros(text: str, hint: str) -> int:
    try:
        return parse_credits(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None


def _print(account: Account, as_json: bool) -> None:
    if as_json:
        print_json(account_json(account))
        return
    print_line(f"account  {account.id}, created {format_time(account, 'create_time')}")
    print_line(f"plan     {_plan(account)}{_format_limits(account)}")
    if account.HasField("disable_time"):
        print_line(f"disabled {format_time(account, 'disable_time')}: its keys are refused")
    for name, balance in (("live", account.live), ("test", account.test)):
        postpaid = (
            f" and a credit limit of {format_credits(balance.credit_limit_micros)}"
            if balance.credit_limit_micros
            else ""
        )
        print_line(
            f"{name:<8} {format_credits(balance.available_micros)} credits left of "
            f"{format_credits(balance.granted_micros)}{postpaid}: "
            f"{format_credits(balance.spent_micros)} spent, {format_credits(balance.held_micros)} reserved"
        )


def _plan(account: Account) -> str:
    plan = account.plan if account.HasField("limits") else f"{account.plan} (there is no such plan)"
    return f"{plan} (disabled)" if account.HasField("disable_time") else plan


def _format_limits(account: Account) -> str:
    if not account.HasField("limits"):
        return ""
    limits = account.limits
    given = {field.name: value for field, value in limits.ListFields()}
    parts = [describe(given[name]) for name, describe in _LIMITS.items() if name in given]
    if limits.HasField("models"):
        parts.append(f"models {', '.join(limits.models.models)}")
    return f": {', '.join(parts) or 'no limits'}"


def account_json(account: Account) -> bytes:
    """Returns the JSON object of an account: as over REST, but with the credits of both modes."""
    from pydantic_core import to_json

    from gateway.objects import render_balance, render_limits

    fields = {
        "id": account.id,
        "object": "account",
        "plan": account.plan,
        "limits": render_limits(account.limits) if account.HasField("limits") else None,
        "created": unix_time(account, "create_time"),
    }
    if account.HasField("disable_time"):
        fields["disabled"] = unix_time(account, "disable_time")
    live, test = render_balance(account.live), render_balance(account.test)
    return to_json(fields)[:-1] + b',"live":' + live + b',"test":' + test + b"}"
