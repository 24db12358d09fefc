"""`pomelo accounts`: making accounts, giving them credits, and putting them on plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pomelo.cli import times
from pomelo.cli.operator import call_operator, list_pages
from pomelo.cli.terminal import Config, Json, print_json, print_json_list, print_table, say

if TYPE_CHECKING:
    from pomelo.gen.v1.account_service_pb2 import Balance
    from pomelo.gen.v1.admin_service_pb2 import AccountDetail

Name = Annotated[str, typer.Argument(metavar="NAME", help="An account: see pomelo accounts list.")]

_LIMITS = (
    ("requests a minute", "requests_per_minute"),
    ("at once", "concurrent_requests"),
    ("tokens a minute", "tokens_per_minute"),
)


def commands() -> typer.Typer:
    """The commands of the noun."""
    app = typer.Typer(
        help="Make accounts, give credits, change plans.", no_args_is_help=True, rich_markup_mode=None
    )
    app.command("create")(create)
    app.command("list")(list_accounts)
    app.command("show")(show)
    app.command("grant")(grant)
    app.command("plan")(plan)
    return app


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, dots, dashes, underscores.")],
    plan: Annotated[str, typer.Option(metavar="P", help="Its plan. Default: free.")] = "",
    credits: Annotated[  # noqa: A002 - the name of the option
        str, typer.Option(metavar="N", help="Live credits to begin with, such as 10 or 2.5. Default: none.")
    ] = "0",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Make an account. It has 100 test credits to begin with."""
    from pomelo.gen.v1 import admin_service_pb2 as pb
    from pomelo.settings import load

    request = pb.CreateAccountRequest(name=name, plan=plan, live_micros=_micros(credits, "--credits"))
    response = call_operator(load(config), lambda operator: operator.create_account(request), creates=True)
    _tell(response.account, as_json)


def list_accounts(config: Config = None, as_json: Json = False) -> None:
    """List accounts by name, with the credits that are left."""
    from pomelo.gen.v1 import admin_service_pb2 as pb
    from pomelo.money import format_credits
    from pomelo.settings import load

    query = pb.ListAccountsRequest()
    found = list_pages(load(config), query, lambda operator: operator.list_accounts(query))
    if as_json:
        print_json_list(_json(account) for page in found for account in page.accounts)
        return
    for page in found:
        rows = [
            (
                account.name,
                _plan(account),
                format_credits(account.live.available_micros),
                format_credits(account.test.available_micros),
                times.shown(account, "create_time") or "",
            )
            for account in page.accounts
        ]
        print_table(("NAME", "PLAN", "CREDITS", "TEST_CREDITS", "CREATED"), rows)


def show(name: Name, config: Config = None, as_json: Json = False) -> None:
    """Tell of one account: its plan, its limits, its credits."""
    from pomelo.gen.v1 import admin_service_pb2 as pb
    from pomelo.settings import load

    request = pb.ShowAccountRequest(name=name)
    response = call_operator(load(config), lambda operator: operator.show_account(request))
    _tell(response.account, as_json)


def grant(
    name: Name,
    credits: Annotated[  # noqa: A002 - what it is
        str, typer.Argument(metavar="CREDITS", help="How many, such as 10 or 2.5; at most 6 places.")
    ],
    test: Annotated[bool, typer.Option("--test", help="Test credits. Default: live ones.")] = False,
    note: Annotated[str, typer.Option(metavar="TEXT", help="What it is for.")] = "",
    once: Annotated[
        str,
        typer.Option(
            "--id", metavar="ID", help="A name of your own for it: a second grant of that name gives nothing."
        ),
    ] = "",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Give credits to an account."""
    from pomelo.gen.v1 import admin_service_pb2 as pb
    from pomelo.settings import load

    request = pb.GrantCreditsRequest(
        name=name,
        amount_micros=_micros(credits, "CREDITS"),
        mode=pb.KEY_MODE_TEST if test else pb.KEY_MODE_LIVE,
        note=note,
        grant_id=once,
    )
    response = call_operator(load(config), lambda operator: operator.grant_credits(request))
    _tell(response.account, as_json)


def plan(
    name: Name,
    plan: Annotated[str, typer.Argument(metavar="P", help="A built-in plan, or one of pomelo.toml.")],
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Put an account on another plan."""
    from pomelo.gen.v1 import admin_service_pb2 as pb
    from pomelo.settings import load

    request = pb.SetPlanRequest(name=name, plan=plan)
    response = call_operator(load(config), lambda operator: operator.set_plan(request))
    _tell(response.account, as_json)


def _micros(text: str, hint: str) -> int:
    """Microcredits of what was typed.

    Raises:
        typer.BadParameter: it is no number of credits.
    """
    from pomelo.money import parse_credits

    try:
        return parse_credits(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None


def _tell(account: AccountDetail, as_json: bool) -> None:
    from pomelo.money import format_credits

    if as_json:
        print_json(_json(account))
        return
    say(f"account  {account.name}, made {times.shown(account, 'create_time')}")
    say(f"plan     {_plan(account)}{_told_limits(account)}")
    for name, balance in (("live", account.live), ("test", account.test)):
        say(
            f"{name:<8} {format_credits(balance.available_micros)} credits left of "
            f"{format_credits(balance.granted_micros)}: {format_credits(balance.spent_micros)} spent, "
            f"{format_credits(balance.held_micros)} held"
        )


def _plan(account: AccountDetail) -> str:
    return account.plan if account.HasField("limits") else f"{account.plan} (there is no such plan)"


def _told_limits(account: AccountDetail) -> str:
    if not account.HasField("limits"):
        return ""
    limits = account.limits
    parts = [f"{getattr(limits, field):,} {words}" for words, field in _LIMITS if getattr(limits, field)]
    if limits.models:
        parts.append(f"models {', '.join(limits.models)}")
    return f": {', '.join(parts) or 'no limits'}"


def _json(account: AccountDetail) -> dict[str, Any]:
    limits: dict[str, Any] | None = None
    if account.HasField("limits"):
        limits = {field: getattr(account.limits, field) or None for _, field in _LIMITS}
        limits["models"] = list(account.limits.models) or None
    return {
        "name": account.name,
        "plan": account.plan,
        "limits": limits,
        "live": _credits(account.live),
        "test": _credits(account.test),
        "created": times.shown(account, "create_time"),
    }


def _credits(balance: Balance) -> dict[str, str]:
    """Decimal text: what reads JSON may have floats alone."""
    from pomelo.money import format_credits

    return {
        "granted": format_credits(balance.granted_micros),
        "spent": format_credits(balance.spent_micros),
        "held": format_credits(balance.held_micros),
        "available": format_credits(balance.available_micros),
    }
