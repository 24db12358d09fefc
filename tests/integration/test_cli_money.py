"""The commands that change money by hand, limit keys and show the log, with a server and without one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from tests.integration.commands import pomelo, pomelo_json
from tests.serving import Served


async def test_credits_are_corrected_lent_and_listed_in_the_log(command_folder: Path) -> None:
    folder = command_folder
    assert (await pomelo(folder, "accounts", "create", "acme", "--credits", "1000")).status == 0
    correct = ("accounts", "adjust", "acme", "-900.5", "--note", "a zero too many", "--id", "fix-1")
    for _ in range(2):
        corrected = await pomelo(folder, *correct)
        assert (corrected.status, corrected.error) == (0, "")
        assert "live     99.5 credits left of 99.5" in corrected.out
    refused = await pomelo(folder, "accounts", "adjust", "acme", "-99.6", "--note", "too much")
    assert refused.status == 1
    assert "AMOUNT: must be -99.5 or more: at most 99.5 credits can be taken back" in refused.error
    nameless = await pomelo(folder, "accounts", "adjust", "acme", "-1")
    assert nameless.status == 2
    assert "--note" in nameless.error
    postpaid = await pomelo(folder, "accounts", "postpaid", "acme", "--limit", "50")
    assert "live     149.5 credits left of 99.5 and a credit limit of 50: 0 spent" in postpaid.out
    assert (await pomelo(folder, "accounts", "adjust", "acme", "-149.5", "--note", "used")).status == 0
    refused = await pomelo(folder, "accounts", "postpaid", "acme", "--limit", "49")
    assert refused.status == 1
    assert "must be 50 or more: the account has used 50 credits" in refused.error
    assert (await pomelo(folder, "accounts", "adjust", "acme", "149.5", "--note", "back")).status == 0
    assert (await pomelo(folder, "accounts", "disable", "acme")).status == 0
    table = (await pomelo(folder, "accounts", "list")).out
    assert "acme     free (disabled)" in table
    assert (await pomelo(folder, "accounts", "enable", "acme")).status == 0
    log = await pomelo_json(folder, "log", "--account", "acme")
    assert [(act["action"], act["mode"], act["old"], act["new"]) for act in log][:-3] == [
        ("enable_account", None, "disabled", "enabled"),
        ("disable_account", None, "enabled", "disabled"),
        ("adjust_credits", "live", "-50", "99.5"),
        ("adjust_credits", "live", "99.5", "-50"),
        ("set_credit_limit", "live", "0", "50"),
        ("adjust_credits", "live", "1000", "99.5"),
    ]
    assert log[5]["note"] == "a zero too many"
    assert {(act["object"], type(act["time"])) for act in log} == {("act", int)}
    table = (await pomelo(folder, "log", "--since", "2026-01-01")).out
    assert "adjust_credits" in table
    for status in (0, 1):
        taken = await pomelo(folder, "accounts", "adjust", "acme", "-100", "--test", "--note", "no test")
        assert taken.status == status
    assert "must be above 0: the account has no credits that can be taken back" in taken.error
    audit = await pomelo(folder, "audit")
    assert (audit.status, audit.out.splitlines()[-1]) == (0, "Difference: none")


async def test_a_key_gets_a_name_a_budget_and_a_successor(command_folder: Path) -> None:
    folder = command_folder
    created = await pomelo_json(folder, "keys", "create", "--name", "website", "--budget", "5/day")
    key_id = created["id"]
    assert (created["name"], created["budget"], created["last_use"]) == ("website", "5/day", None)
    changed = await pomelo(folder, "keys", "budget", key_id, "20.5/month")
    assert changed.out == f"The budget of {key_id} of default is now 20.5/month\n"
    rotated = await pomelo_json(folder, "keys", "rotate", key_id, "--grace", "24h")
    assert (rotated["name"], rotated["budget"]) == ("website", "20.5/month")
    keys = {key["id"]: key for key in await pomelo_json(folder, "keys", "list")}
    assert (keys[key_id]["state"], keys[rotated["id"]]["expires"]) == ("active", None)
    assert keys[key_id]["expires"] > keys[rotated["id"]]["created"]
    for budget in ("5", "5/hour", "x/day", "-5/day"):
        refused = await pomelo(folder, "keys", "budget", key_id, budget)
        assert refused.status == 2
    zero = await pomelo(folder, "keys", "create", "--budget", "0/day")
    assert zero.status == 2
    assert "5/day" in zero.error


@asynccontextmanager
async def answers_lost(served: Served, word: bytes) -> AsyncIterator[None]:
    """Puts a proxy in front of the operator's socket. It closes a connection instead of passing on an answer with
    this word."""
    path, moved = served.data / "admin.sock", served.data / "moved.sock"
    path.rename(moved)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(moved)

        async def send() -> None:
            while data := await reader.read(65536):
                server_writer.write(data)

        sending = asyncio.create_task(send())
        with suppress(ConnectionError):
            while (data := await server_reader.read(65536)) and word not in data:
                writer.write(data)
        sending.cancel()
        server_writer.close()
        writer.close()

    try:
        async with await asyncio.start_unix_server(serve, path):
            yield
    finally:
        path.unlink(missing_ok=True)
        moved.rename(path)


async def test_an_error_after_which_a_change_may_have_been_made_says_so(served: Served) -> None:
    """Whoever repeats a grant whose answer was lost grants it twice."""
    folder = served.data.parent
    assert (await pomelo(folder, "accounts", "create", "acme")).status == 0
    lost = "pomelo: The server at data/admin.sock does not answer"
    note = "The change may have been made: see pomelo log"
    async with answers_lost(served, b"acme"):
        granted = await pomelo(folder, "accounts", "grant", "acme", "5", POMELO_DATA="data")
        assert (granted.status, granted.error) == (1, f"{lost}. {note}\n")
        shown = await pomelo(folder, "accounts", "show", "acme", POMELO_DATA="data")
        assert (shown.status, shown.error) == (1, f"{lost}\n")
        created = await pomelo(folder, "keys", "create", "acme", POMELO_DATA="data")
        assert (created.status, created.error) == (1, f"{lost}. {note}\n")
    acts = [act["action"] for act in await pomelo_json(folder, "log", "--account", "acme")]
    assert acts[:2] == ["create_key", "grant_credits"]
