"""A cluster of Redis in which one server hangs."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

from redis.crc import key_slot

from pomelo.errors import PomeloError
from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.ledger import Reserved
from pomelo.stores.redis import Timing, open_redis
from pomelo.stores.redis.key_names import names
from tests.contract.cluster_rig import SLOTS, ClusterNodes, connect_nodes
from tests.contract.ledger_rig import request

LONG = 60.0


async def reserve(store: Any, task_id: str, wallet: Wallet) -> object:
    with suppress(PomeloError):
        return await store.reserve(request(task_id, 1, account=wallet.account, live=wallet.live))
    return None


async def test_a_server_that_hangs_does_not_delay_the_wallets_of_others(tmp_path: Path) -> None:
    with ClusterNodes(3) as nodes:
        await connect_nodes(nodes)
        url = f"redis+cluster://127.0.0.1:{nodes[0].port}"
        timing = Timing(timeout=LONG, attempt_timeout=LONG, heartbeat=3600.0, dead_after=3600.0)
        async with open_redis(url, f"sqlite:{tmp_path / 'usage.db'}", timing=timing) as store:
            wallets: dict[int, Wallet] = {}
            for number in range(1_000):
                wallet = Wallet(f"account{number}", True)
                wallets[key_slot(names(wallet).wallet.encode()) * len(nodes) // SLOTS] = wallet
            for number, wallet in wallets.items():
                await store.add_account(wallet.account, "pro", 1.0)
                await store.grant(Grant(f"g{number}", wallet, 1_000, 1.0))
                await reserve(store, f"first{number}", wallet)
            # Neither the node that knows the accounts nor the one with the list of workers.
            hanging = wallets.pop(2)
            nodes[2].stop()
            try:
                waiting = [asyncio.ensure_future(reserve(store, f"w{n}", hanging)) for n in range(100)]
                async with asyncio.timeout(20):
                    for number, wallet in wallets.items():
                        assert isinstance(await reserve(store, f"second{number}", wallet), Reserved)
                assert not any(one.done() for one in waiting)
            finally:
                nodes[2].resume()
            assert all(isinstance(found, Reserved) for found in await asyncio.gather(*waiting))
