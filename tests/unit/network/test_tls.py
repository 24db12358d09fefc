"""The certificate of the servers: its files, and its replacement while connections are made."""

from __future__ import annotations

import logging
import ssl
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pomelo.configuration import find_certificate
from pomelo.configuration.reload import GatewayReloader, merge
from pomelo.network.tls import ReplaceableContext, default_context, read_certificate
from pomelo.settings import Settings, SettingsError
from tests.certificates import make_certificate, trusting


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two certificates."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("first", "second"):
        make_certificate(folder, name, name)
    return folder


def test_an_authority_needs_no_extensions_on_any_python() -> None:
    assert not default_context().verify_flags & ssl.VERIFY_X509_STRICT


def presented(context: ssl.SSLContext, server_name: str | None = None) -> bytes:
    """The certificate that a client gets of a server with this context."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = trusting().wrap_bio(to_client, to_server, server_hostname=server_name)
    for _ in range(5):
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return client.getpeercert(binary_form=True) or b""


def der(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text())


@pytest.mark.parametrize("server_name", [None, "localhost"])
def test_new_connections_get_the_certificate_that_replaces_another(
    folder: Path, server_name: str | None
) -> None:
    first, second = (
        read_certificate(folder / f"{n}.pem", folder / f"{n}.key", None) for n in ("first", "second")
    )
    replaceable = ReplaceableContext(first)
    assert presented(replaceable.context, server_name) == der(folder / "first.pem")
    replaceable.replace(second)
    assert presented(replaceable.context, server_name) == der(folder / "second.pem")
    assert replaceable.context is first.context


def test_certificates_are_equal_if_their_files_are(folder: Path) -> None:
    pem, key = folder / "first.pem", folder / "first.key"
    one, again = read_certificate(pem, key, None), read_certificate(pem, key, None)
    assert one == again
    assert one != read_certificate(folder / "second.pem", folder / "second.key", None)
    with_authority = read_certificate(pem, key, folder / "second.pem")
    assert (one == with_authority, with_authority.client_ca) == (False, (folder / "second.pem").read_bytes())
    assert "PRIVATE" not in repr(one)
    assert (one.chain, one.key) == (pem.read_bytes(), key.read_bytes())


@pytest.mark.parametrize(
    ("days", "more"),
    [
        ("2", ""),
        ("3000", ""),
        ("20000", ""),  # after 2049, times have another form
        ("90", "/O=" + "a long name of an organisation " * 2 + "/OU=" + "of a department " * 4),
    ],
)
def test_the_end_of_a_certificate_is_read(folder: Path, tmp_path: Path, days: str, more: str) -> None:
    make_certificate(tmp_path, "a", "a", "-days", days, "-subj", f"{more}/CN=a")
    command = ["openssl", "x509", "-enddate", "-noout", "-in", "a.pem"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    expected = ssl.cert_time_to_seconds(shown.strip().removeprefix("notAfter="))
    chain = (folder / "first.pem").read_bytes()
    (tmp_path / "chain.pem").write_bytes(b"text before\n" + (tmp_path / "a.pem").read_bytes() + chain)
    assert read_certificate(tmp_path / "chain.pem", tmp_path / "a.key", None).ends == expected


def test_the_end_of_what_is_no_certificate_is_not_known(folder: Path) -> None:
    certificate = read_certificate(folder / "first.pem", folder / "first.key", None)
    for chain in (b"", b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"):
        assert replace(certificate, chain=chain).ends is None


def test_files_that_do_not_go_together_are_named(folder: Path, tmp_path: Path) -> None:
    pem, key = folder / "first.pem", folder / "first.key"
    with pytest.raises(ValueError, match=r"^POMELO_TLS_KEY: .*second\.key is not the key of .*first\.pem$"):
        read_certificate(pem, folder / "second.key", None)
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("nothing")
    with pytest.raises(
        ValueError, match=r"^POMELO_TLS_CERT: .*wrong\.pem and .* are no certificate and key in PEM"
    ):
        read_certificate(wrong, key, None)
    with pytest.raises(ValueError, match=r"^POMELO_TLS_CLIENT_CA: .*wrong\.pem has no PEM certificate"):
        read_certificate(pem, key, wrong)
    settings = Settings(tls_cert=pem, tls_key=folder / "second.key")
    with pytest.raises(SettingsError, match="POMELO_TLS_KEY"):
        find_certificate(settings)
    settings = Settings(tls_cert=wrong, tls_key=key)
    wrong.unlink()
    with pytest.raises(SettingsError, match=r"^POMELO_TLS_CERT: .*wrong\.pem: No such file or directory"):
        find_certificate(settings)


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "locked.key"
    command = [
        "openssl",
        "ec",
        "-in",
        str(folder / "first.key"),
        "-aes256",
        "-passout",
        "pass:secret",
        "-out",
        str(key),
    ]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(
        ValueError, match=r"locked\.key are no certificate and key in PEM without a password$"
    ):
        read_certificate(folder / "first.pem", key, None)


def test_files_that_change_while_they_are_read_are_not_used(folder: Path) -> None:
    class Replaced(type(folder)):  # type: ignore[misc]
        """Another file each time that it is read."""

        reads = 0

        def read_bytes(self) -> bytes:
            Replaced.reads += 1
            return b"\n" * Replaced.reads + bytes(super().read_bytes())

    with pytest.raises(ValueError, match="POMELO_TLS_CERT: the files change while they are read"):
        read_certificate(Replaced(folder / "first.pem"), folder / "first.key", None)


async def test_a_gateway_gets_a_new_certificate_and_keeps_the_old_one_if_it_is_wrong(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pem, key = tmp_path / "c.pem", tmp_path / "c.key"

    def use(name: str) -> None:
        pem.write_bytes((folder / f"{name}.pem").read_bytes())
        key.write_bytes((folder / f"{name}.key").read_bytes())

    caplog.set_level(logging.INFO, "pomelo.reload")
    use("first")
    settings = Settings(tls_cert=pem, tls_key=key)
    reloader = GatewayReloader(settings)
    assert reloader.tls is not None
    await reloader.reload(lambda: settings)
    use("second")
    await reloader.reload(lambda: settings.model_copy(update={"grace": 5.0}))
    assert presented(reloader.tls.context) == der(folder / "second.pem")
    await reloader.reload(lambda: settings)
    pem.write_text("nothing")
    await reloader.reload(lambda: settings)
    assert presented(reloader.tls.context) == der(folder / "second.pem")
    first, second, fixed, third, refusal = caplog.messages
    assert first == third == "The configuration was reloaded: nothing has changed"
    assert second.startswith("The configuration was reloaded: ")
    assert "certificate" in second
    assert fixed == "Restart to apply POMELO_GRACE"
    assert "are no certificate and key in PEM" in refusal


async def test_a_gateway_without_tls_stays_without_it(folder: Path) -> None:
    reloader = GatewayReloader(Settings())
    assert reloader.tls is None
    await reloader.reload(lambda: Settings(tls_cert=folder / "first.pem", tls_key=folder / "first.key"))
    assert reloader.tls is None


@pytest.mark.parametrize("on", [True, False])
def test_tls_is_turned_on_or_off_by_a_restart_only(folder: Path, on: bool) -> None:
    files = {"tls_cert": folder / "first.pem", "tls_key": folder / "first.key"}
    secure, plain = Settings(**files), Settings()  # type: ignore[arg-type]
    running, new = (plain, secure) if on else (secure, plain)
    merged, fixed = merge(running, new)
    assert (merged.tls_cert, merged.tls_key) == (running.tls_cert, running.tls_key)
    assert fixed == ["POMELO_TLS_CERT", "POMELO_TLS_KEY"]
    with_authority = secure.model_copy(update={"tls_client_ca": folder / "second.pem"})
    running, new = (secure, with_authority) if on else (with_authority, secure)
    merged, fixed = merge(running, new)
    assert (merged.tls_client_ca, fixed) == (running.tls_client_ca, ["POMELO_TLS_CLIENT_CA"])
    another = secure.model_copy(update={"tls_cert": folder / "second.pem", "tls_key": folder / "second.key"})
    merged, fixed = merge(secure, another)
    assert (merged.tls_cert, merged.tls_key, fixed) == (another.tls_cert, another.tls_key, [])
