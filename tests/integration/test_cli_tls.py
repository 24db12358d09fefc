"""The command line against servers that speak TLS: its own, another one, and what is said when it fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.certificates import make_certificate
from tests.integration.commands import Running, addresses, pomelo, staying
from tests.ports import free_port


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-signed pairs: `named` for another name, `here` for localhost; and `issued` by an authority, `ca`."""
    made = tmp_path_factory.mktemp("pairs")
    make_certificate(made, "named", "pomelo.example")
    make_certificate(made, "here", "localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    make_certificate(made, "ca", "Test authority")
    issued = (
        "-addext",
        "subjectAltName=DNS:*.pomelo.example",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
    )
    make_certificate(made, "issued", "pomelo.example", "-CA", "ca.pem", "-CAkey", "ca.key", *issued)
    return made


def tls(pairs: Path, name: str, **more: str) -> dict[str, str]:
    return {
        "POMELO_TLS_CERT": str(pairs / f"{name}.pem"),
        "POMELO_TLS_KEY": str(pairs / f"{name}.key"),
    } | more


@asynccontextmanager
async def serving(folder: Path, **variables: str) -> AsyncIterator[Running]:
    async with staying(folder, "serve", **variables) as server:
        await server.until("curl ")
        yield server


async def found(folder: Path, **variables: str) -> dict[str, tuple[str, str]]:
    ended = await pomelo(folder, "doctor", "--json", **variables)
    return {row["name"]: (row["state"], row["detail"]) for row in json.loads(ended.out)}


@pytest.mark.parametrize("pair", ["named", "here", "issued"])
@pytest.mark.parametrize("callers", [False, True], ids=["any caller", "callers with a certificate"])
async def test_the_own_server_is_reached_whoever_vouches_for_its_certificate(tmp_path, pairs, pair, callers):
    authority = "ca.pem" if pair == "issued" else f"{pair}.pem"
    client_ca = {"POMELO_TLS_CLIENT_CA": str(pairs / authority)} if callers else {}
    variables = addresses() | tls(pairs, pair, **client_ca)
    async with serving(tmp_path, **variables):
        ended = await pomelo(tmp_path, "run", "Hello", **variables)
        assert (ended.status, ended.error) == (0, "")
        assert "Hello" in ended.out
        assert (await pomelo(tmp_path, "models", **variables)).status == 0
        states = await found(tmp_path, **variables)
        assert (states["gRPC"][0], states["REST"][0]) == ("ok", "ok"), states


async def test_another_certificate_at_the_own_address_is_told_from_nobody(tmp_path, pairs):
    places = addresses()
    async with serving(tmp_path, **places, **tls(pairs, "here")):
        stranger = tls(pairs, "named")
        ended = await pomelo(tmp_path, "run", "Hello", **places, **stranger)
        assert ended.status == 1
        assert "certificate is not trusted" in ended.error
        states = await found(tmp_path, **places, **stranger)
        assert [states[door][0] for door in ("gRPC", "REST")] == ["broken", "broken"]
        assert all("not trusted" in states[door][1] for door in ("gRPC", "REST"))
    nobody = await pomelo(tmp_path, "run", "Hello", **places, **tls(pairs, "here"))
    assert "No server answers at" in nobody.error


async def test_a_server_elsewhere_is_trusted_by_the_authority_that_is_named(tmp_path, pairs):
    places = addresses()
    target = ("--target", places["POMELO_GRPC"])
    async with serving(tmp_path, **places, **tls(pairs, "here")):
        good = await pomelo(tmp_path, "run", "Hello", *target, "--ca", str(pairs / "here.pem"))
        assert (good.status, good.error) == (0, "")
        wrong = await pomelo(tmp_path, "models", *target, "--ca", str(pairs / "ca.pem"))
        assert (wrong.status, wrong.error.count("\n")) == (1, 1)
        assert "Name its authority with --ca FILE" in wrong.error
        plain = await pomelo(tmp_path, "models", *target)
        assert "speaks no gRPC without TLS" in plain.error
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    assert (
        "holds no PEM certificate" in (await pomelo(tmp_path, "models", *target, "--ca", "empty.pem")).error
    )


async def test_a_good_certificate_of_another_name_is_said_to_be_that(tmp_path, pairs):
    places = addresses()
    async with serving(tmp_path, **places, **tls(pairs, "issued")):
        target = ("--target", places["POMELO_GRPC"], "--ca", str(pairs / "ca.pem"))
        assert "by a name that is in its certificate" in (await pomelo(tmp_path, "models", *target)).error


async def test_a_caller_without_a_certificate_is_told_that_one_is_asked_for(tmp_path, pairs):
    places = addresses()
    asks = tls(pairs, "here", POMELO_TLS_CLIENT_CA=str(pairs / "here.pem"))
    target = ("--target", places["POMELO_GRPC"], "--ca", str(pairs / "here.pem"))
    async with serving(tmp_path, **places, **asks):
        bare = await pomelo(tmp_path, "models", *target)
        assert "asks for a client certificate" in bare.error
        assert (await pomelo(tmp_path, "models", *target, **tls(pairs, "here"))).status == 0


async def test_a_gateway_speaks_tls_as_it_is_told(tmp_path, pairs):
    places = addresses()
    rest = f"127.0.0.1:{free_port()}"
    options = ("--target", places["POMELO_GRPC"], "--ca", str(pairs / "here.pem"))
    async with serving(tmp_path, **places, **tls(pairs, "here")):
        key = (tmp_path / "data" / "test-key").read_text().strip()
        async with (
            staying(tmp_path, "gateway", *options, POMELO_REST=rest) as gateway,
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
        ):
            assert await gateway.until("gRPC") == f"gRPC  asks {places['POMELO_GRPC']}"
            async with session.get(f"http://{rest}/api/v1/models") as answer:
                assert answer.status == 200
            gateway.process.terminate()
            await gateway.until("Ending: running tasks have 10 s.")
            assert await gateway.ends() == 0
    both = await pomelo(tmp_path, "gateway", *options, "--no-tls", POMELO_REST=rest)
    assert "--ca and --no-tls exclude each other" in both.error


@pytest.mark.parametrize(("option", "first"), [("--tls", b"\x16"), ("--no-tls", b"P")])
async def test_a_gateway_begins_with_a_handshake_only_where_tls_is_wanted(tmp_path, option, first):
    seen: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        byte = await reader.read(1)
        if not seen.done():
            seen.set_result(byte)
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    rest = f"127.0.0.1:{free_port()}"
    async with (
        server,
        staying(tmp_path, "gateway", "--target", target, option, POMELO_REST=rest) as gateway,
        aiohttp.ClientSession(headers={"Authorization": "Bearer x"}) as session,
    ):
        await gateway.until("gRPC")
        asking = asyncio.create_task(session.get(f"http://{rest}/api/v1/models"))
        async with asyncio.timeout(30):
            assert await seen == first
            (await asking).close()
