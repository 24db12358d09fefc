"""Stores under simulated processes, and what is wrong with them at random."""

from __future__ import annotations

import asyncio
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest
from redis import Redis

from pomelo.stores.base import Store
from pomelo.stores.redis import open_redis
from pomelo.stores.redis.key_names import names
from pomelo.stores.sqlite import open_sqlite
from tests.contract.ledger_rig import abandon
from tests.faults.simulated_network import Network, SimulatedLoop
from tests.faults.simulated_tasks import BUDGETS, PLAN, WALLETS, Facts, Process
from tests.redis_server import any_server

EPOCH = 1_800_000_000.0


class SimulatedStore(ABC):
    """A store, and the processes that have it open. `exceeds`: vendors may count more than was reserved."""

    def __init__(self, folder: Path, random: Random, facts: Facts, *, exceeds: bool) -> None:
        self.processes: list[Process] = []
        self.random = random
        self.facts = facts
        self.exceeds = exceeds
        self._folder = folder
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        self._loop = loop
        self._stack = AsyncExitStack()

    def _add(self, store: Store) -> None:
        self.processes.append(Process(store, self.random, self.facts, exceeds=self.exceeds))

    @abstractmethod
    async def open(self) -> None:
        """Opens the store, in all processes."""

    @abstractmethod
    async def fail(self) -> None:
        """Begins or ends a fault, or kills a process and starts its successor."""

    @abstractmethod
    async def recover(self) -> None:
        """Ends all faults."""

    @abstractmethod
    def check(self) -> None:
        """Checks the wallets as they are now."""

    async def check_end(self) -> None:
        """Checks what is left when all tasks have ended."""
        self.check()

    async def close(self) -> None:
        for process in self.processes:
            await process.stop()
        await self._stack.aclose()


class SimulatedRedis(SimulatedStore):
    """Three processes on a real server, each with a network of its own."""

    async def open(self) -> None:
        self._networks: list[Network] = []
        self._server = Redis.from_url(any_server())
        self._stack.callback(self._server.close)
        self._server.flushdb()
        for _ in range(3):
            await self._open_process()

    async def _open_process(self) -> None:
        port = int(self._server.connection_pool.connection_kwargs["port"])
        network = Network(port, self.random)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("pomelo.stores.redis.url.open_link", network.open_link)
            store: Any = await self._stack.enter_async_context(
                open_redis(
                    f"redis://127.0.0.1:{port}?persistence=none",
                    f"sqlite:{self._folder / 'usage.db'}",
                    now=lambda: EPOCH,
                    monotonic=self._loop.time,
                    server_time=lambda: EPOCH + self._loop.time(),
                )
            )
        store.drain_usage()
        self._add(store)
        self._networks.append(network)

    async def fail(self) -> None:
        random, number = self.random, self.random.randrange(len(self.processes))
        network = self._networks[number]
        match random.choice(("faults", "faults", "faults", "block", "forget", "kill")):
            case "faults":
                network.faults = random.choice((0.0, 0.02, 0.3))
            case "block":
                network.blocked_until = self._loop.time() + random.choice((1.0, 10.0, 45.0))
            case "forget":
                self._server.script_flush()
            case _:
                process = self.processes.pop(number)
                self._networks.remove(network)
                await abandon(process.store)
                await process.stop()
                network.blocked_until = 0.0
                await self._open_process()

    async def recover(self) -> None:
        for network in self._networks:
            network.faults = 0.0

    def check(self) -> None:
        for wallet in WALLETS:
            keys = names(wallet)
            with self._server.pipeline() as together:
                together.hgetall(keys.wallet)
                together.hgetall(keys.holds)
                stored, holds = together.execute()
            granted, spent, held, concurrency = (
                int(stored.get(name, 0)) for name in (b"granted", b"spent", b"held", b"concurrency")
            )
            assert min(spent, held, granted - spent - held) >= 0
            assert held == sum(int(text.split(b" ")[2]) for text in holds.values())
            assert len(holds) <= (PLAN.concurrent or 0)
            assert not holds or concurrency == len(holds)
            if not self.exceeds:
                for budget in BUDGETS.values():
                    assert int(stored.get(budget.name.encode(), 0)) <= budget.limit

    async def check_end(self) -> None:
        self.check()
        answers = list(self._server.scan_iter("*:answer:*"))
        assert all(self._server.hexists(key, "answer") for key in answers)

    async def close(self) -> None:
        await self.recover()
        await super().close()


class SimulatedSqlite(SimulatedStore):
    """One process on a file. Its statements are interrupted at random: by SQLite itself, which then rolls back."""

    _faults = 0.0
    _opening = False
    _generation = 0
    _writer: Any = None

    async def open(self) -> None:
        self._loop.wait_while(lambda: self._opening or self._writer._writing is not None)
        self._path = self._folder / "0" / "pomelo.db"
        await self._open_process()

    async def _open_process(self) -> None:
        random, self._opening = Random(self.random.random()), True
        opened = open_sqlite(self._path, now=lambda: EPOCH, monotonic=self._loop.time)
        store: Any = await self._stack.enter_async_context(opened)
        self._opening, self._writer = False, store._writer

        def interrupts() -> bool:
            return random.random() < self._faults

        await self._writer.do(lambda connection: connection.set_progress_handler(interrupts, 40), reads=True)
        self._add(store)

    async def fail(self) -> None:
        if self.random.random() < 0.7:
            self._faults = self.random.choice((0.0, 0.002, 0.02, 1.0))
            return
        while self._writer._writing is not None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        process: Any = self.processes.pop()
        left, self._generation = self._path, self._generation + 1
        self._path = self._folder / str(self._generation) / "pomelo.db"
        self._path.parent.mkdir()
        with process.store._log_size._turnstile:  # the log is not emptied meanwhile
            for suffix in ("", "-wal"):
                shutil.copyfile(f"{left}{suffix}", f"{self._path}{suffix}")
        await process.stop()
        self._faults = 0.0
        await self._open_process()

    async def recover(self) -> None:
        self._faults = 0.0

    def check(self) -> None:
        store: Any = self.processes[0].store
        tasks, wallets = store._ledger._tasks.values(), store._ledger._wallets.values()
        held: Counter[object] = Counter()
        for task in tasks:
            held[task.wallet] += task.amount
            held[task.budget] += task.amount
            assert task.wallet in wallets
        for wallet in wallets:
            assert wallet.held == held[wallet]
            assert wallet.running == sum(task.wallet is wallet for task in tasks) <= (PLAN.concurrent or 0)
            assert wallet.counts.get("concurrency", [0])[0] == wallet.running
            assert not wallet.loaded or min(wallet.spent, wallet.available) >= 0
            for budget in wallet.budgets.values():
                assert budget.held == held[budget]
                if wallet.loaded and not self.exceeds:
                    limits = {each.name: each.limit for each in BUDGETS.values()}
                    assert budget.spent + budget.held <= limits[budget.name]

    async def check_end(self) -> None:
        self.check()
        balances = [await self.processes[0].store.balance(wallet) for wallet in WALLETS]
        await self.close()
        self.processes.clear()
        self._stack = AsyncExitStack()
        await self._open_process()
        assert [await self.processes[0].store.balance(wallet) for wallet in WALLETS] == balances
