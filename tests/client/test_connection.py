"""Where a client connects to, with which key, and over TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from pomelo.app import App
from pomelo.client import ApiError, Client, ServerUnavailable
from pomelo.client.connection import Attempts, ClientBase, Connection
from pomelo.network.tls import read_certificate
from pomelo.server.server import ServerOptions, open_server
from pomelo.settings import load
from tests.client.conftest import ClientFactory
from tests.conftest import Keys


def connection(target: str | None = None, key: str | None = "pml_test_x", **options: Any) -> Connection:
    return ClientBase(target, key=key, **options)._connection


@pytest.mark.parametrize(
    ("target", "address", "secure"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051", False),
        ("localhost:1", "localhost:1", False),
        ("[::1]:50051", "[::1]:50051", False),
        ("http://10.0.0.5:50051", "10.0.0.5:50051", False),
        ("http://pomelo.example", "pomelo.example:80", False),
        ("https://127.0.0.1:50051/", "127.0.0.1:50051", True),
        ("https://pomelo.example", "pomelo.example:443", True),
        ("pomelo.example:50051", "pomelo.example:50051", True),
        ("[2001:db8::1]:50051", "[2001:db8::1]:50051", True),
        ("unix:/run/pomelo.sock", "unix:/run/pomelo.sock", False),
        (None, "127.0.0.1:50051", False),
    ],
)
def test_a_target_has_tls_unless_it_is_on_this_machine(
    target: str | None, address: str, secure: bool
) -> None:
    made = connection(target)
    assert (made.target, made.credentials is not None) == (address, secure)


@pytest.mark.parametrize(
    "target", ["pomelo.example", "ftp://host:1", "host:port", "https://host/path", "https://", ":1"]
)
def test_what_is_no_target_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"no target|no port"):
        connection(target)


def test_target_and_key_come_from_the_environment_which_a_server_accepts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="POMELO_KEY"):
        connection(key=None)
    variables = {"POMELO_TARGET": "https://pomelo.example", "POMELO_KEY": "pml_test_y"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    made = connection(key=None)
    assert (made.target, made.key) == ("pomelo.example:443", "pml_test_y")
    assert connection("127.0.0.1:1", "pml_test_x").key == "pml_test_x"
    for empty in ({"target": ""}, {"key": ""}):
        with pytest.raises(ValueError, match=r"no target|no key"):
            connection(**empty)
    assert load(None, variables)


def test_the_key_has_no_line_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connection(key="pml_test_of_a_file\n").key == "pml_test_of_a_file"
    monkeypatch.setenv("POMELO_KEY", "pml_test_y\r\n")
    assert connection(key=None).key == "pml_test_y"
    with pytest.raises(ValueError, match="There is no key"):
        connection(key=" \n")


def test_the_key_is_never_shown() -> None:
    assert "pml_test_x" not in repr(connection())
    for key in ("pml\n_test_", "pml_tést_secret", "two words"):
        with pytest.raises(ValueError, match="characters that no key has") as caught:
            connection(key=key)
        assert key not in str(caught.value)


def test_a_stream_outside_a_block_says_how_to_open_it() -> None:
    with Client(key="pml_test_x") as client, pytest.raises(RuntimeError, match="with client"):
        next(client.stream("gpt-4", "Hi"))


@pytest.mark.parametrize("clients", [False, True], ids=["any client", "clients with a certificate"])
async def test_a_server_with_tls_is_reached_by_its_authority(
    connect: ClientFactory, app: App, keys: Keys, certificates: Path, clients: bool
) -> None:
    ca = certificates / "ca.pem"
    options = ServerOptions(
        "127.0.0.1:0",
        certificate=read_certificate(
            certificates / "server.pem", certificates / "server.key", ca if clients else None
        ),
    )
    own = {"certificate": (certificates / "client.pem", certificates / "client.key")} if clients else {}
    async with open_server(app.services, options) as server:
        target = f"localhost:{server.address.rpartition(':')[2]}"
        for trusted in (ca, str(ca), ca.read_bytes()):
            assert (await connect(keys.test, f"https://{target}", ca=trusted, **own).account()).plan
            assert (await connect(keys.test, target, ca=trusted, **own).account()).plan
        wrong: list[dict[str, Any]] = [{"target": f"https://{target}"}, {"target": target}]
        if clients:
            wrong.append({"target": target, "ca": ca})
        for arguments in wrong:
            with pytest.raises(ServerUnavailable, match="TLS"):
                await connect(keys.test, retries=0, **arguments).account()


class Failed(grpc.RpcError):  # type: ignore[misc]
    """A failed call, with the wait that the server asks for."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return ""

    def initial_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("grpc-retry-pushback-ms", "500"),)


def attempts_of(retries: int) -> Attempts:
    return Attempts(Connection("127.0.0.1:1", "k", None, 600, retries, strict=False), task=True)


def test_the_wait_that_a_server_asks_for_is_at_least_kept_and_not_the_same_for_all() -> None:
    waits = {attempts_of(1).wait(Failed(grpc.StatusCode.RESOURCE_EXHAUSTED)) for _ in range(20)}
    assert len(waits) > 1
    assert 0.5 <= min(waits) <= max(waits) <= 0.75


def test_waiting_for_an_attempt_that_broke_counts_as_no_retry() -> None:
    attempts = attempts_of(2)
    assert attempts.wait(Failed(grpc.StatusCode.UNAVAILABLE))
    for _ in range(5):
        assert attempts.wait(Failed(grpc.StatusCode.ABORTED))
    assert attempts.wait(Failed(grpc.StatusCode.UNAVAILABLE))
    with pytest.raises(ApiError):
        attempts.wait(Failed(grpc.StatusCode.UNAVAILABLE))
