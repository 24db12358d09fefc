"""Tasks on the added store, over all protocols: run in the copy by test_store.py."""

from __future__ import annotations

from pathlib import Path

from tests.app import run_app
from tests.driver import PROTOCOLS
from tests.tasks import text_body


async def test_every_protocol_charges_on_it(tmp_path: Path) -> None:
    async with run_app(tmp_path, settings={"store": f"folder://{tmp_path / 'store'}"}) as running:
        account = await running.account("five", test=1_000_000)
        for protocol in (*PROTOCOLS, "grpc", "rest"):
            assert (await running.ask(protocol, account.test, text_body(max_tokens=50))).code == "ok"
        refused = await running.ask("remote", account.test, text_body(max_tokens=50))
        assert (refused.code, refused.headers["x-ratelimit-remaining"]) == ("rate_limit_exceeded", "0")
        records = await running.records(account)
        assert len(records) == 5
        assert (await running.balance(account)).spent == sum(record.cost for record in records) > 0
        await running.assert_audit_clean()
    assert (tmp_path / "store" / "pomelo.db").exists()
