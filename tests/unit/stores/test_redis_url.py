"""How a URL of Redis is used: the login, TLS, and what is checked of the server."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis import exceptions as errors

from pomelo.stores import check_store
from pomelo.stores.base import StoreError
from pomelo.stores.redis.connection import Timing
from pomelo.stores.redis.link import Command, Login, open_link, pack
from pomelo.stores.redis.url import SCHEMES, connect, parse_url
from tests.certificates import make_certificate
from tests.ports import free_port
from tests.unit.stores.fake_redis import FakeServer
from tests.waiting import until

GOOD = {"redis_version": "7.2.4", "role": "master", "maxmemory_policy": "noeviction", "aof_enabled": "1"}


def answers_info(facts: dict[str, str]) -> Callable[[bytes], bytes]:
    """The answers of a server that accepts every login."""
    info = "".join(f"{name}:{value}\r\n" for name, value in facts.items()).encode()

    def answer(chunk: bytes) -> bytes:
        accepted = b"+OK\r\n" * (chunk.count(b"AUTH") + chunk.count(b"SELECT"))
        return accepted + b"$%d\r\n%s\r\n" % (len(info), info) * chunk.count(b"INFO")

    return answer


async def check(url: str) -> str:
    """Why the server of a URL is refused; empty if it is accepted."""
    try:
        client = await connect(parse_url(url), Timing(attempt_timeout=5.0))
    except StoreError as error:
        return str(error)
    await client.aclose()
    return ""


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, ""),
        ({"redis_version": "6.1.240"}, "Redis 6.1.240 is too old"),
        ({"redis_version": "6.2.0"}, ""),
        ({"redis_version": "10.0.0"}, ""),
        ({"redis_version": "5.0.1", "server_name": "valkey", "valkey_version": "8.1.0"}, ""),
        ({"cluster_enabled": "1"}, "The Redis server is a node of a cluster. Use redis+cluster://"),
        ({"role": "slave"}, "is a replica, which takes no writes"),
        ({"maxmemory_policy": "allkeys-lru"}, "(maxmemory-policy allkeys-lru)"),
        (
            {"maxmemory_policy": "volatile-ttl", "server_name": "valkey"},
            "The Valkey server throws credits away",
        ),
        ({"aof_enabled": "0"}, "Set appendonly yes"),
    ],
)
async def test_a_server_is_accepted_only_if_it_keeps_credits(
    server: FakeServer, facts: dict[str, str], message: str
) -> None:
    server.answer = answers_info(GOOD | facts)
    found = await check(f"redis://127.0.0.1:{server.port}")
    assert message in found
    assert bool(found) == bool(message)
    await until(lambda: server.ended == server.connections == 1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            b"-NOPERM User ada has no permissions to run the 'info' command\r\n",
            "run INFO. Allow all commands",
        ),
        (b"-NOAUTH Authentication required.\r\n", "refused the user or password"),
        (b"-ERR out of order\r\n", "can't be reached: out of order"),
    ],
)
async def test_the_error_of_a_server_says_what_to_do(server: FakeServer, answer: bytes, message: str) -> None:
    server.answer = lambda chunk: answer
    assert message in await check(f"redis://127.0.0.1:{server.port}")


async def test_a_server_that_does_not_answer_in_time_once_is_asked_again(server: FakeServer) -> None:
    good = answers_info(GOOD)
    server.answer = lambda chunk: b"" if server.connections == 1 else good(chunk)
    client = await connect(parse_url(f"redis://127.0.0.1:{server.port}"), Timing(timeout=20.0))
    await client.aclose()
    assert server.connections == 2


async def test_a_server_that_never_answers_is_refused_in_time(server: FakeServer) -> None:
    server.answer = lambda chunk: b""
    with pytest.raises(StoreError, match="can't be reached: Timeout reading"):
        await connect(
            parse_url(f"redis://127.0.0.1:{server.port}"), Timing(timeout=0.15, attempt_timeout=0.1)
        )
    assert 1 <= server.connections <= 3


@pytest.mark.parametrize("connects", [False, True])
@pytest.mark.parametrize("url", ["redis+sentinel://{}/main", "redis+cluster://{}"])
async def test_several_servers_that_never_answer_are_refused_in_time(url: str, connects: bool) -> None:
    with socket.socket() as listening, ExitStack() as clients:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100 if connects else 0)
        where = listening.getsockname()
        for _ in range(0 if connects else 4):  # the queue of the server is full
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(where)
        hosts = ",".join([f"127.0.0.1:{where[1]}"] * 5)
        async with asyncio.timeout(20):
            with pytest.raises(StoreError, match="can't be reached"):
                await connect(parse_url(url.format(hosts)), Timing(timeout=0.15, attempt_timeout=0.1))


async def test_only_a_server_that_does_not_answer_is_asked_again(server: FakeServer) -> None:
    server.answer = lambda chunk: None
    url = parse_url(f"redis://127.0.0.1:{server.port}/3")
    with pytest.raises(StoreError, match="can't be reached"):
        await connect(url, Timing(), patience=0.2)
    assert server.connections == 1


@pytest.mark.parametrize(
    ("login", "db", "sent"),
    [
        ("", "", []),
        ("", "/0", []),
        ("ada:p%20w@", "/3", [b"AUTH ada p w", b"SELECT 3"]),
        (":p%40w@", "", [b"AUTH p@w"]),
        ("%C3%BC:@", "/15", [b"AUTH \xc3\xbc ", b"SELECT 15"]),
    ],
)
async def test_a_connection_begins_with_the_login_of_its_url(
    server: FakeServer, login: str, db: str, sent: list[bytes]
) -> None:
    server.answer = answers_info(GOOD)
    assert await check(f"redis://{login}127.0.0.1:{server.port}{db}") == ""
    lines = b"".join(server.chunks).split(b"\r\n")
    words = [line for line in lines[:-1] if not line.startswith(b"$")]
    commands = b"\n".join(words).split(b"*")[1:]
    assert [b" ".join(each.rstrip(b"\n").split(b"\n")[1:]) for each in commands[:-1]] == [
        each.rstrip(b" ") for each in sent
    ]


async def test_a_server_with_tls_gets_the_certificate_of_the_url(tmp_path: Path) -> None:
    make_certificate(tmp_path, "cert", "localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tmp_path / "cert.pem")
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "cert.key")
    context.verify_mode = ssl.CERT_REQUIRED
    fake = FakeServer()
    fake.answer = answers_info(GOOD)
    async with await asyncio.start_server(fake.serve, "127.0.0.1", 0, ssl=context) as listening:
        port = listening.sockets[0].getsockname()[1]
        authority = f"ssl_ca_certs={tmp_path}/cert.pem"
        own = f"ssl_certfile={tmp_path}/cert.pem&ssl_keyfile={tmp_path}/cert.key"
        assert await check(f"rediss://127.0.0.1:{port}?{authority}&{own}") == ""
        for url in (
            f"rediss://127.0.0.1:{port}?{own}",
            f"rediss://127.0.0.1:{port}?{authority}",
            f"redis://127.0.0.1:{port}",
        ):
            assert "can't be reached" in await check(url)


async def test_what_a_server_with_tls_has_not_read_is_unsent(tmp_path: Path) -> None:
    make_certificate(tmp_path, "cert", "localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "cert.key")
    left = asyncio.Event()

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await left.wait()
        writer.transport.abort()

    async with await asyncio.start_server(leave, "127.0.0.1", 0, ssl=context) as listening:
        login = Login(2.0, ssl.create_default_context(cafile=tmp_path / "cert.pem"))
        link = await open_link(listening.sockets[0].getsockname(), login)
        reply = asyncio.get_running_loop().create_future()
        link.send([Command(pack(("SET", "key", bytes(16_000_000))), reply)])
        await until(lambda: link._silent > 0)
        assert link._unsent > 1_000_000
        left.set()
        with pytest.raises(errors.ConnectionError):
            await reply


@pytest.mark.parametrize("scheme", ["rediss://{}", "rediss+cluster://{}", "rediss+sentinel://{}/main"])
async def test_a_file_of_a_url_that_can_not_be_used_is_named(tmp_path: Path, scheme: str) -> None:
    make_certificate(tmp_path, "cert", "localhost")
    cert, key, absent = tmp_path / "cert.pem", tmp_path / "cert.key", tmp_path / "absent"
    url = scheme.format("127.0.0.1:1")
    for options, refusal in (
        (
            f"ssl_ca_certs={absent}",
            f"ssl_ca_certs in POMELO_STORE: {absent} can't be read. No such file or directory",
        ),
        (
            f"ssl_ca_certs={tmp_path}",
            f"ssl_ca_certs in POMELO_STORE: {tmp_path} can't be read. Is a directory",
        ),
        (
            f"ssl_ca_certs={key}",
            f"ssl_ca_certs in POMELO_STORE: {key} can't be read. Use PEM without a password",
        ),
        (
            f"ssl_certfile={cert}&ssl_keyfile={absent}",
            f"ssl_certfile in POMELO_STORE: {cert} and {absent} can't be read. No such file or directory",
        ),
        (
            f"ssl_certfile={cert}",
            f"ssl_certfile in POMELO_STORE: {cert} can't be read. Use PEM without a password",
        ),
        (f"ssl_keyfile={key}", "ssl_keyfile in POMELO_STORE needs the certificate: add ssl_certfile"),
    ):
        assert await check(f"{url}?{options}") == refusal


async def test_sentinels_without_a_primary_are_an_error_of_one_short_line() -> None:
    port = free_port()
    assert await check(f"redis+sentinel://:secret@127.0.0.1:{port}/main") == (
        f"The Redis server at 127.0.0.1:{port} can't be reached: no Sentinel there reports a primary of 'main'. "
        "Start it, or correct POMELO_STORE"
    )


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_url_without_a_server_is_refused_with_its_form(scheme: str) -> None:
    with pytest.raises(StoreError, match=re.escape(f"names no server. Use {scheme}://HOST:PORT")):
        await check_store(f"{scheme}://")
