"""`pomelo keys`: making, listing and ending keys.

Asks the server through its socket where one runs; else opens the store itself and asks the same servicer.
"""

import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pomelo.cli.terminal import Config, FailureError, Json, print_json, print_table

if TYPE_CHECKING:
    from pomelo.gen.v1.admin_service_pb2 import Key
    from pomelo.settings import Settings

KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="The id of a key: see pomelo keys list.")]

_SPAN = re.compile(r"([1-9][0-9]{0,5})([mhdw])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def commands() -> typer.Typer:
    """The commands of the noun."""
    app = typer.Typer(help="Make, list and end API keys.", no_args_is_help=True, rich_markup_mode=None)
    app.command("create")(create)
    app.command("list")(list_keys)
    app.command("rotate")(rotate)
    app.command("revoke")(revoke)
    return app


def create(
    account: Annotated[str, typer.Argument(help="Whose key it is.")] = "default",
    live: Annotated[
        bool, typer.Option("--live", help="A live key, for the providers. Default: a test key.")
    ] = False,
    models: Annotated[str, typer.Option(metavar="M,…", help="The models it may use. Default: all.")] = "",
    expires: Annotated[
        str,
        typer.Option(metavar="WHEN", help="When it ends: 30d, 12h or 2027-01-31T12:00Z. Default: never."),
    ] = "",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it, alone on the last line. It can't be shown again."""
    from pomelo.gen.v1 import admin_service_pb2 as pb

    request = pb.CreateKeyRequest(
        account=account,
        mode=pb.KEY_MODE_LIVE if live else pb.KEY_MODE_TEST,
        models=[name.strip() for name in models.split(",") if name.strip()],
    )
    if expires:
        request.expire_time.FromNanoseconds(int(when(expires, time.time()) * 1000) * 1_000_000)
    _show_new(_ask(config, "CreateKey", request), as_json)


def list_keys(
    account: Annotated[str, typer.Argument(help="Whose keys. Default: everybody's.")] = "",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List keys, oldest first; never their secrets."""
    from pomelo.gen.v1 import admin_service_pb2 as pb

    keys = _ask(config, "ListKeys", pb.ListKeysRequest(account=account)).keys
    if as_json:
        print_json([_json(key) for key in keys])
        return
    rows = [
        (
            key.key_id,
            key.account,
            _mode(key),
            ",".join(key.models) or "all",
            _time(key, "create_time") or "",
            _time(key, "expire_time") or "never",
            state(key),
        )
        for key in keys
    ]
    print_table(("KEY_ID", "ACCOUNT", "MODE", "MODELS", "CREATED", "EXPIRES", "STATE"), rows)


def rotate(key_id: KeyId, config: Config = None, as_json: Json = False) -> None:
    """Make a key like another one and end the other. Prints the new key, alone on the last line."""
    from pomelo.gen.v1 import admin_service_pb2 as pb

    _show_new(_ask(config, "RotateKey", pb.RotateKeyRequest(key_id=key_id)), as_json)


def revoke(key_id: KeyId, config: Config = None, as_json: Json = False) -> None:
    """End a key, at once and for good."""
    from pomelo.gen.v1 import admin_service_pb2 as pb

    key = _ask(config, "RevokeKey", pb.RevokeKeyRequest(key_id=key_id)).key
    if as_json:
        print_json(_json(key))
    else:
        typer.echo(f"Revoked {key.key_id} of {key.account}")


def when(text: str, now: float) -> float:
    """Unix seconds of a span from `now` (m, h, d, w) or of an ISO date or time, UTC where it names no zone.

    Raises:
        typer.BadParameter: it is neither.
    """
    from datetime import UTC, datetime

    span = _SPAN.fullmatch(text)
    if span:
        return now + int(span[1]) * _SECONDS[span[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a span such as 30d nor a time such as 2027-01-31T12:00Z",
            param_hint="--expires",
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def ask(settings: "Settings", method: str, request: Any) -> Any:
    """What AdminService answers: the server's, or one that is made here for a moment.

    Raises:
        PomeloError: a refusal; SettingsError, StoreError: the data folder can't be used.
    """
    from pomelo.cli.client import is_served, operator

    if is_served(settings.admin_socket):
        from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceStub

        with operator(settings.admin_socket) as channel:
            return getattr(AdminServiceStub(channel), method)(request, timeout=30)
    if method != "CreateKey" and not settings.data.exists():
        raise FailureError(f"There is no data folder {settings.data}. Set POMELO_DATA, or run: pomelo serve")
    import asyncio

    return asyncio.run(_ask_here(settings, method, request))


def _ask(config: Path | None, method: str, request: Any) -> Any:
    from pomelo.settings import load

    return ask(load(config), method, request)


async def _ask_here(settings: "Settings", method: str, request: Any) -> Any:
    from pomelo.admission.keys import Keyring
    from pomelo.catalog import Catalog
    from pomelo.server.admin import AdminServicer
    from pomelo.stores import open_store

    secret = settings.root_secret()
    async with open_store(settings.store_url()) as store:
        servicer = AdminServicer(Keyring(store, secret), Catalog.load().models)
        here: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "CreateKey": servicer.create_key,
            "ListKeys": servicer.list_keys,
            "RotateKey": servicer.rotate_key,
            "RevokeKey": servicer.revoke_key,
        }
        return await here[method](request)


def _show_new(answer: Any, as_json: bool) -> None:
    if as_json:
        print_json(_json(answer.key) | {"key": answer.secret})
        return
    key = answer.key
    models = ", ".join(key.models) or "all models"
    ends = _time(key, "expire_time") or "never"
    typer.echo(f"A {_mode(key)} key of {key.account} for {models}; it ends: {ends}.")
    typer.echo("Keep it: it can't be shown again.")
    typer.echo(answer.secret)


def _json(key: "Key") -> dict[str, Any]:
    return {
        "key_id": key.key_id,
        "account": key.account,
        "mode": _mode(key),
        "models": list(key.models),
        "created": _time(key, "create_time"),
        "expires": _time(key, "expire_time"),
        "revoked": _time(key, "revoke_time"),
        "state": state(key),
    }


def _mode(key: "Key") -> str:
    from pomelo.gen.v1 import admin_service_pb2 as pb

    return "live" if key.mode == pb.KEY_MODE_LIVE else "test"


def state(key: "Key") -> str:
    """revoked, expired or active."""
    if key.HasField("revoke_time"):
        return "revoked"
    if key.HasField("expire_time") and key.expire_time.ToNanoseconds() <= time.time_ns():
        return "expired"
    return "active"


def _time(key: "Key", field: Any) -> str | None:
    if not key.HasField(field):
        return None
    at: str = getattr(key, field).ToDatetime().strftime("%Y-%m-%dT%H:%M:%SZ")
    return at
