"""The client of the command line: the addresses that it can reach, and its key."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pomelo.cli import trust
from pomelo.cli.client import NobodyError, find_key, new_call, open_client
from pomelo.cli.terminal import FailureError
from pomelo.server.remote import open_remote
from pomelo.service import list_all_models
from pomelo.settings import Settings
from tests.ports import free_port


@pytest.mark.parametrize(
    ("address", "target", "message"),
    [
        ("", None, "POMELO_GRPC is empty"),
        ("127.0.0.1:0", None, "POMELO_GRPC has port 0"),
        ("127.0.0.1:1", "nowhere", "--target "),
    ],
)
async def test_an_address_without_a_host_or_port_is_refused(
    address: str, target: str | None, message: str
) -> None:
    with pytest.raises(FailureError, match=message):
        async with open_client(open_remote, Settings(grpc=address), target):
            raise AssertionError("a channel was opened")


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
async def test_a_server_on_every_address_is_looked_for_on_loopback(host: str) -> None:
    port = free_port()
    settings = Settings(grpc=f"{host}:{port}", insecure=True)
    with pytest.raises(NobodyError, match=f"No server answers at 127.0.0.1:{port}"):
        async with open_client(open_remote, settings, None) as services:
            await list_all_models(services.models, new_call("pml_test_any"))


@pytest.mark.parametrize("over_tls", [False, True])
def test_a_server_that_hangs_is_distinguished_from_one_that_speaks_something_else(
    monkeypatch: pytest.MonkeyPatch, over_tls: bool
) -> None:
    monkeypatch.setattr(trust, "_TIMEOUT", 0.2)
    context = trust.trust_authority(None) if over_tls else None
    with socket.create_server(("127.0.0.1", 0)) as hanging:  # the kernel accepts connections for it
        port = hanging.getsockname()[1]
        assert trust.diagnose("127.0.0.1", port, context) == (
            "it listens, but does not answer: it hangs, or is overloaded"
        )
    assert trust.diagnose("127.0.0.1", port, context) is None


def test_the_key_is_the_given_one_or_that_of_the_data_folder_without_a_line_end(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    with pytest.raises(FailureError, match="set POMELO_KEY or --key"):
        find_key(settings, None)
    settings.key_file.write_bytes(b"\xff")
    with pytest.raises(FailureError, match="can't be read"):
        find_key(settings, None)
    settings.key_file.write_text("pml_test_development\n")
    assert find_key(settings, None) == "pml_test_development"
    assert find_key(settings, "pml_test_given\n") == "pml_test_given"


@pytest.mark.parametrize("key", ["schlüssel", "pml\ntest", "pml\x00test"])
def test_a_key_with_other_characters_than_a_header_has_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(FailureError, match="characters that no key has"):
        find_key(Settings(data=tmp_path), key)
