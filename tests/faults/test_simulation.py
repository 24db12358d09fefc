"""A simulation of several processes on one Redis server, with faults at random: whatever happens, no balance is
overdrawn, nothing stays reserved, and each task is charged once.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import pytest
from redis import Redis

from pomelo.accounts.audit import audit
from pomelo.stores.accounts import Grant
from pomelo.stores.base import Store
from pomelo.stores.redis import open_redis
from pomelo.stores.redis.key_names import names
from pomelo.stores.usage import UsageQuery, UsageRecord
from tests.contract.ledger_rig import abandon
from tests.faults.simulated_network import Network, SimulatedLoop
from tests.faults.simulated_tasks import BUDGETS, PLAN, WALLETS, Facts, Process
from tests.redis_server import any_server

SEEDS = int(os.environ.get("POMELO_SIMULATIONS", "2"))
PROCESSES = 3
SECONDS = 150.0
"""Simulated seconds in which tasks begin."""

QUIET = 180.0
"""Simulated seconds after the last fault in which all must end: a lease, and two reconciliations."""

EPOCH = 1_800_000_000.0


class Simulation:
    """The processes, their networks, and a direct connection to the server."""

    def __init__(self, seed: int, folder: Path, server: Redis) -> None:
        self.random = Random(seed)
        self.facts = Facts()
        self.exceeds = seed % 2 == 0
        """Whether vendors may count more than was reserved."""
        self.processes: list[Process] = []
        self.networks: list[Network] = []
        self._archive = f"sqlite:{folder / 'usage.db'}"
        self._server = server
        self._stack = AsyncExitStack()
        self._loop = asyncio.get_running_loop()

    async def open(self) -> Store:
        """Opens the store of another process, on a network without faults until then."""
        port = int(self._server.connection_pool.connection_kwargs["port"])
        network = Network(port, self.random)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("pomelo.stores.redis.url.open_link", network.open_link)
            store: Store = await self._stack.enter_async_context(
                open_redis(
                    f"redis://127.0.0.1:{port}?persistence=none",
                    self._archive,
                    now=lambda: EPOCH,
                    monotonic=self._loop.time,
                    server_time=lambda: EPOCH + self._loop.time(),
                )
            )
        self.processes.append(Process(store, self.random, self.facts, exceeds=self.exceeds))
        self.networks.append(network)
        return store

    async def close(self) -> None:
        for network in self.networks:
            network.faults = 0.0
        for process in self.processes:
            await process.stop()
        await self._stack.aclose()

    async def run(self) -> None:
        """Runs tasks and faults for SECONDS, and then until all have ended."""
        random = self.random
        end = self._loop.time() + SECONDS
        while self._loop.time() < end:
            await asyncio.sleep(random.expovariate(8.0))
            chance, number = random.random(), random.randrange(PROCESSES)
            if chance < 0.93:
                self.processes[number].begin()
            elif chance < 0.98:
                self.processes[number].operate()
            elif chance < 0.99:
                self.networks[number].faults = random.choice((0.0, 0.02, 0.3))
            elif chance < 0.995:
                self.networks[number].blocked_until = self._loop.time() + random.choice((1.0, 10.0, 45.0))
            elif chance < 0.997:
                self._server.script_flush()
            else:
                await self._kill(number)
            self.check()
        for network in self.networks:
            network.faults = 0.0
        await asyncio.sleep(QUIET)
        for process in self.processes:
            await process.finished()

    async def _kill(self, number: int) -> None:
        """Kills a process, and starts another one in its place."""
        process, network = self.processes.pop(number), self.networks.pop(number)
        await abandon(process.store)
        await process.stop()
        network.blocked_until = 0.0
        await self.open()
        self.facts.tally["killed"] += 1

    def check(self) -> None:
        """Checks the wallets as the server has them now."""
        for wallet in WALLETS:
            keys = names(wallet)
            with self._server.pipeline() as together:
                together.hgetall(keys.wallet)
                together.hgetall(keys.holds)
                stored, holds = together.execute()
            amounts = {
                name: int(stored.get(name, 0)) for name in (b"granted", b"spent", b"held", b"concurrency")
            }
            granted, spent, held, concurrency = amounts.values()
            assert min(spent, held, granted - spent - held) >= 0
            assert held == sum(int(text.split(b" ")[2]) for text in holds.values())
            assert len(holds) <= (PLAN.concurrent or 0)
            assert not holds or concurrency == len(holds)
            if not self.exceeds:
                for budget in BUDGETS.values():
                    assert int(stored.get(budget.name.encode(), 0)) <= budget.limit

    async def check_books(self) -> None:
        """Checks what is left when all tasks have ended."""
        facts, store = self.facts, self.processes[0].store
        self.check()
        assert await store.reservations() == []
        assert list((await audit(store)).findings) == []
        records = {record.task_id: record for record in await all_records(store)}
        for task_id, charged in facts.charged.items():
            assert records[task_id] == charged
        assert not records.keys() & facts.refused
        assert records.keys() <= facts.tasks.keys()
        for answer in facts.answers.values():
            for replayed in answer.replayed:
                assert replayed == records[answer.task_id]
        for wallet in WALLETS:
            stored = self._server.hgetall(names(wallet).wallet)
            for budget in BUDGETS.values():
                of_budget = [
                    record.cost
                    for task_id, record in records.items()
                    if facts.tasks[task_id] == (wallet, budget.name)
                ]
                assert int(stored.get(budget.name.encode(), 0)) == sum(of_budget)
            given = await store.list_grants(wallet)
            assert all(facts.grants[grant.grant_id] == (wallet, grant.amount) for grant in given)
            assert len({grant.grant_id for grant in given}) == len(given)
        left = [
            key for key in self._server.scan_iter("*:answer:*") if not self._server.hexists(key, "answer")
        ]
        assert left == []


async def all_records(store: Store) -> list[UsageRecord]:
    """All records, also those of failed tasks."""
    found = []
    for query in (UsageQuery(), UsageQuery(failed=True)):
        after = ""
        while True:
            page, after = await store.list_usage(query, limit=1_000, after=after)
            found += page
            if not after:
                break
    return found


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_fault_of_a_network_or_process_overdraws_a_balance_or_charges_a_task_twice(
    seed: int, tmp_path: Path
) -> None:
    async def simulate() -> None:
        with Redis.from_url(any_server()) as server:
            server.flushdb()
            simulation = Simulation(seed, tmp_path, server)
            try:
                for _ in range(PROCESSES):
                    store = await simulation.open()
                await store.add_account("acme", "simulated", EPOCH)
                for wallet in WALLETS:
                    grant = Grant(f"first {wallet.live}", wallet, 5_000, EPOCH)
                    simulation.facts.grants[grant.grant_id] = wallet, grant.amount
                    await store.grant(grant)
                await simulation.run()
                await simulation.check_books()
            finally:
                await simulation.close()

    loop = SimulatedLoop()
    try:
        loop.run_until_complete(simulate())
    finally:
        loop.close()
