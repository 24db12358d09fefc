"""`pomelo alerts`: shows the secret that alerts are signed with, and sends one to try the receivers."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import typer

from pomelo.cli.terminal import Commands, Config, FailureError, print_line

if TYPE_CHECKING:
    from pomelo.settings import Settings


def commands() -> Commands:
    app = Commands("Alerts for the operator, by webhook.")
    app.add("test", send_test)
    app.add("secret", secret)
    return app


def send_test(config: Config = None) -> None:
    """Send an alert of the type `test` to each receiver, once. Status 1 if one did not get it."""
    from pomelo.settings import load

    settings = load(config)
    if not settings.alert_url:
        raise FailureError("No receiver of alerts is set. Set POMELO_ALERT_URL")
    results = asyncio.run(_send(settings, _keys(settings)))
    for receiver, failure in results:
        print_line(failure or f"Delivered to {receiver}")
    if any(failure for _, failure in results):
        raise typer.Exit(1)


def secret(config: Config = None) -> None:
    """Print the secrets that alerts are signed with. Each is on a line, the current one first."""
    from pomelo.alerts.alert import encode_secret
    from pomelo.settings import load

    for key in _keys(load(config)):
        print_line(encode_secret(key))


def _keys(settings: Settings) -> tuple[bytes, ...]:
    from pomelo.alerts.alert import signing_keys

    root = settings.shared_secret()
    if root is None and not settings.alert_secret:
        raise FailureError("There is no root secret yet. Start the server once, or set POMELO_ALERT_SECRET")
    return signing_keys(settings.alert_secret, [*filter(None, [root]), *settings.previous_secrets()])


async def _send(settings: Settings, keys: tuple[bytes, ...]) -> list[tuple[str, str]]:
    """The receivers, and why each did not get the alert, empty if it did."""
    from pomelo.alerts.alert import Alert
    from pomelo.alerts.webhooks import open_webhooks, origin
    from pomelo.ids import new_id

    alert = Alert(new_id("alert_"), "test", time.time(), {"message": "Alerts of Pomelo reach you here"})
    async with open_webhooks(settings.alert_url, keys) as webhooks:
        posts = (webhooks.post(alert, url) for url in webhooks.urls)
        return list(zip(map(origin, webhooks.urls), await asyncio.gather(*posts), strict=True))
