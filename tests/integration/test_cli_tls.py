"""The command line with TLS: the own server, other servers, and the errors of failed connections."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from pomelo.cli import trust
from pomelo.network.addresses import split_address
from tests.certificates import make_certificate, make_expired
from tests.integration.commands import (
    development_key,
    doctor,
    free_addresses,
    pomelo,
    start_command,
    start_server,
)
from tests.ports import free_port
from tests.rest_driver import RestDriver

NOT_KNOWN_AS_LOOPBACK = "LOCALHOST"
"""Leads to 127.0.0.1, but could be the name of another machine."""

HANDSHAKE, PLAIN = b"\x16", b"P"
"""The first byte of a connection with and without TLS."""


@asynccontextmanager
async def first_byte() -> AsyncIterator[tuple[int, asyncio.Future[bytes]]]:
    """Yields a port that takes connections and closes them, and the first byte of the first one."""
    seen: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            byte = await reader.read(1)
            if byte and not seen.done():
                seen.set_result(byte)
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], seen


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of certificates with keys: self-signed `named` for another name and `here` for localhost, and
    `issued` by the authority `ca`."""
    folder = tmp_path_factory.mktemp("pairs")
    make_certificate(folder, "named", "pomelo.example")
    make_certificate(folder, "here", "localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    make_certificate(folder, "ca", "Test authority")
    issued = (
        "-addext",
        "subjectAltName=DNS:*.pomelo.example",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
    )
    make_certificate(folder, "issued", "pomelo.example", "-CA", "ca.pem", "-CAkey", "ca.key", *issued)
    return folder


def tls(pairs: Path, name: str, **more: str) -> dict[str, str]:
    cert, key = str(pairs / f"{name}.pem"), str(pairs / f"{name}.key")
    return {"POMELO_TLS_CERT": cert, "POMELO_TLS_KEY": key} | more


@pytest.mark.parametrize("pair", ["named", "here", "issued"])
@pytest.mark.parametrize("callers", [False, True], ids=["any caller", "callers with a certificate"])
async def test_the_own_server_is_reached_with_any_issuer_of_its_certificate(
    tmp_path: Path, pairs: Path, pair: str, callers: bool
) -> None:
    authority = "ca.pem" if pair == "issued" else f"{pair}.pem"
    client_ca = {"POMELO_TLS_CLIENT_CA": str(pairs / authority)} if callers else {}
    variables = free_addresses() | tls(pairs, pair, **client_ca)
    async with start_server(tmp_path, **variables):
        result = await pomelo(tmp_path, "run", "Hello", **variables)
        assert (result.status, result.error) == (0, "")
        assert "Hello" in result.out
        assert (await pomelo(tmp_path, "models", **variables)).status == 0
        _, states = await doctor(tmp_path, **variables)
        assert (states["gRPC"][0], states["REST"][0]) == ("ok", "ok"), states
        assert states["TLS"][0] == "warning"  # the certificates of tests end soon


async def test_an_unexpected_certificate_at_the_own_address_is_distinguished_from_no_server(
    tmp_path: Path, pairs: Path
) -> None:
    addresses = free_addresses()
    async with start_server(tmp_path, **addresses, **tls(pairs, "here")):
        other_pair = tls(pairs, "named")
        result = await pomelo(tmp_path, "run", "Hello", **addresses, **other_pair)
        assert result.status == 1
        assert "certificate is not trusted" in result.error
        _, states = await doctor(tmp_path, **addresses, **other_pair)
        assert [states[name][0] for name in ("gRPC", "REST")] == ["broken", "broken"]
        assert all("not trusted" in states[name][1] for name in ("gRPC", "REST"))
    no_server = await pomelo(tmp_path, "run", "Hello", **addresses, **tls(pairs, "here"))
    assert "No server answers at" in no_server.error


@pytest.mark.parametrize("secure", [False, True], ids=["without TLS", "with TLS"])
async def test_a_server_that_speaks_grpc_is_not_said_to_speak_something_else(
    tmp_path: Path, pairs: Path, secure: bool
) -> None:
    """A call may have met a worker that hangs, and the search for the reason another at the same address."""
    variables = free_addresses() | (tls(pairs, "here") if secure else {})
    context = trust.trust_own_certificate(pairs / "here.pem") if secure else None
    _, port = split_address(variables["POMELO_GRPC"])
    async with start_server(tmp_path, **variables):
        found = await asyncio.to_thread(trust.diagnose, "127.0.0.1", port, context)
        assert found == "it listens, but does not answer: it hangs, or is overloaded"


async def test_doctor_says_what_is_wrong_with_a_rotated_certificate(tmp_path: Path, pairs: Path) -> None:
    """The server uses the old files until it reloads, so its health shows nothing of the new ones."""
    pem, key = tmp_path / "served.pem", tmp_path / "served.key"

    def install(certificate: str, private: str) -> None:
        shutil.copy(pairs / certificate, pem)
        shutil.copy(pairs / private, key)

    install("here.pem", "here.key")
    variables = free_addresses() | tls(tmp_path, "served")
    async with start_server(tmp_path, **variables) as server:
        install("named.pem", "named.key")  # and no reload
        _, states = await doctor(tmp_path, **variables)
        assert all("reload the server" in states[name][1] for name in ("gRPC", "REST")), states
        install("here.pem", "named.key")
        status, states = await doctor(tmp_path, **variables)
        assert (status, states["TLS"][0]) == (1, "broken")
        assert "served.key is not the key of" in states["TLS"][1]
        assert (states["gRPC"][0], states["REST"][0]) == ("ok", "ok")
        key.write_text("half a")
        status, states = await doctor(tmp_path, **variables)
        assert (status, states["TLS"][0]) == (1, "broken")

        make_expired(pairs, "here")
        install("expired.pem", "here.key")
        server.process.send_signal(signal.SIGHUP)
        assert '"level":"error"' in await server.read_until("The certificate of POMELO_TLS_CERT ended on 20")
        await server.read_until("TLS certificate changed")
        result = await pomelo(tmp_path, "run", "Hello", **variables)
        assert "certificate has expired. Replace it on the server, and reload" in result.error
        _, states = await doctor(tmp_path, **variables)
        assert "served.pem ended on 20" in states["TLS"][1]
    async with start_command(tmp_path, "serve", **variables) as server:
        await server.read_until("The certificate of POMELO_TLS_CERT ended on 20")


async def test_a_remote_server_is_trusted_through_the_named_authority(tmp_path: Path, pairs: Path) -> None:
    addresses = free_addresses()
    target = ("--target", addresses["POMELO_GRPC"])
    async with start_server(tmp_path, **addresses, **tls(pairs, "here")):
        good = await pomelo(tmp_path, "run", "Hello", *target, "--ca", str(pairs / "here.pem"))
        assert (good.status, good.error) == (0, "")
        wrong = await pomelo(tmp_path, "models", *target, "--ca", str(pairs / "ca.pem"))
        assert (wrong.status, wrong.error.count("\n")) == (1, 1)
        assert "Name its authority with --ca FILE" in wrong.error
        plain = await pomelo(tmp_path, "models", *target)
        assert "speaks no gRPC without TLS" in plain.error
    (tmp_path / "empty.pem").write_text("")
    empty = await pomelo(tmp_path, "models", *target, "--ca", "empty.pem")
    assert "holds no PEM certificate" in empty.error


async def test_a_valid_certificate_of_another_name_is_reported(tmp_path: Path, pairs: Path) -> None:
    addresses = free_addresses()
    async with start_server(tmp_path, **addresses, **tls(pairs, "issued")):
        target = ("--target", addresses["POMELO_GRPC"], "--ca", str(pairs / "ca.pem"))
        assert "by a name that is in its certificate" in (await pomelo(tmp_path, "models", *target)).error


async def test_a_missing_client_certificate_is_reported(tmp_path: Path, pairs: Path) -> None:
    addresses = free_addresses()
    settings = tls(pairs, "here", POMELO_TLS_CLIENT_CA=str(pairs / "here.pem"))
    target = ("--target", addresses["POMELO_GRPC"], "--ca", str(pairs / "here.pem"))
    async with start_server(tmp_path, **addresses, **settings):
        bare = await pomelo(tmp_path, "models", *target)
        assert "asks for a client certificate" in bare.error
        assert (await pomelo(tmp_path, "models", *target, **tls(pairs, "here"))).status == 0


async def test_a_server_whose_own_certificate_is_not_a_callers_is_reached_with_one_that_is(
    tmp_path: Path, pairs: Path
) -> None:
    addresses = free_addresses()
    settings = addresses | tls(pairs, "here", POMELO_TLS_CLIENT_CA=str(pairs / "ca.pem"))
    async with start_server(tmp_path, **settings):
        bare = await pomelo(tmp_path, "models", **settings)
        assert (bare.status, "and the server's own is not one" in bare.error) == (1, True)
        status, states = await doctor(tmp_path, **settings)
        assert (status, states["gRPC"][0]) == (0, "ok")
        assert states["gRPC"][1].endswith("its health was not asked")
        authority = ("--ca", str(pairs / "here.pem"))
        assert (await pomelo(tmp_path, "models", *authority, **addresses, **tls(pairs, "issued"))).status == 0


async def test_a_gateway_uses_tls_according_to_its_options(
    tmp_path: Path, pairs: Path, http: aiohttp.ClientSession
) -> None:
    addresses = free_addresses()
    rest = f"127.0.0.1:{free_port()}"
    options = ("--target", addresses["POMELO_GRPC"], "--ca", str(pairs / "here.pem"))
    async with (
        start_server(tmp_path, **addresses, **tls(pairs, "here")),
        start_command(tmp_path, "gateway", *options, POMELO_REST=rest) as gateway,
    ):
        assert await gateway.read_until("gRPC") == f"gRPC  asks {addresses['POMELO_GRPC']}"
        models = await RestDriver(http, f"http://{rest}").get("/api/v1/models", development_key(tmp_path))
        assert models.status == 200
        gateway.process.terminate()
        await gateway.read_until("Ending: running tasks have 10 s.")
        assert await gateway.wait() == 0
    both = await pomelo(tmp_path, "gateway", *options, "--no-tls", POMELO_REST=rest)
    assert "--ca and --no-tls exclude each other" in both.error


@pytest.mark.parametrize(
    ("host", "options", "first"),
    [
        ("127.0.0.1", (), PLAIN),
        ("ipv4:127.0.0.1", (), PLAIN),
        ("dns:///127.0.0.1", (), PLAIN),
        ("127.0.0.1", ("--tls",), HANDSHAKE),
        (NOT_KNOWN_AS_LOOPBACK, (), HANDSHAKE),
        (NOT_KNOWN_AS_LOOPBACK, ("--no-tls",), PLAIN),
    ],
)
async def test_a_gateway_uses_tls_unless_its_server_is_here_or_it_is_off(
    tmp_path: Path, http: aiohttp.ClientSession, host: str, options: tuple[str, ...], first: bytes
) -> None:
    """Also if POMELO_INSECURE allows its own callers to come without TLS."""
    rest = f"127.0.0.1:{free_port()}"
    async with first_byte() as (port, seen):
        arguments = ("gateway", "--target", f"{host}:{port}", *options)
        variables = {"POMELO_REST": rest, "POMELO_INSECURE": "1"}
        async with start_command(tmp_path, *arguments, **variables) as gateway, asyncio.timeout(30):
            await gateway.read_until("gRPC")
            request = asyncio.create_task(RestDriver(http, f"http://{rest}").get("/api/v1/models", "x"))
            assert await seen == first
            await request


@pytest.mark.parametrize(("host", "first"), [("127.0.0.1", PLAIN), (NOT_KNOWN_AS_LOOPBACK, HANDSHAKE)])
@pytest.mark.parametrize("command", [("models",), ("run", "Hello")], ids=lambda each: each[0])
async def test_a_key_is_not_sent_to_another_machine_without_tls(
    tmp_path: Path, command: tuple[str, ...], host: str, first: bytes
) -> None:
    async with first_byte() as (port, seen):
        arguments = (*command, "--target", f"{host}:{port}", "--key", "pml_test_x")
        assert (await pomelo(tmp_path, *arguments, POMELO_INSECURE="1")).status == 1
        assert await seen == first
