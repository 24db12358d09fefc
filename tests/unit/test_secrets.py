"""The root secret: created once, private, and that of its data folder."""

from __future__ import annotations

import hmac
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pomelo.secrets import derive_key, write_private
from pomelo.settings import Settings, SettingsError, load


def test_the_root_secret_is_created_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / "deep" / "data")
    secret = settings.root_secret()
    assert len(secret) == 64
    assert settings.root_secret() == secret == Settings(data=settings.data).root_secret()
    assert stat.S_IMODE(settings.data.stat().st_mode) == 0o700
    assert stat.S_IMODE((settings.data / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE((settings.data / "secret-check").stat().st_mode) == 0o600
    assert secret.decode() not in (settings.data / "secret-check").read_text()
    assert {path.name for path in settings.data.iterdir()} == {"secret", "secret-check"}


def test_the_key_of_a_purpose_is_a_step_of_hkdf() -> None:
    assert derive_key(b"root", "a") == hmac.digest(b"root", b"a\x01", "sha256") != derive_key(b"root", "b")


@pytest.mark.parametrize("replace", [False, True])
def test_a_private_file_is_replaced_only_on_request(tmp_path: Path, replace: bool) -> None:
    path = tmp_path / "file"
    write_private(path, "first", replace=False)
    write_private(path, "second", replace=replace)
    assert path.read_text() == ("second\n" if replace else "first\n")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_private_file_gets_its_name_once_the_disk_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, named = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: named.append((os.fstat(descriptor), path.exists())))
    write_private(path, "new", replace=True)
    ((synced, was_named),) = named
    assert (synced.st_size, was_named) == (len("new\n"), False)


def test_a_secret_has_at_least_32_characters(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    for length in (0, 31):
        write_private(tmp_path / "secret", "s" * length, replace=True)
        with pytest.raises(SettingsError, match="damaged"):
            Settings(data=tmp_path).root_secret()
    write_private(tmp_path / "secret", "s" * 32, replace=True)
    assert Settings(data=tmp_path).root_secret() == b"s" * 32


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o604])
def test_a_secret_file_is_for_its_owner_alone(tmp_path: Path, mode: int) -> None:
    settings = Settings(data=tmp_path)
    settings.root_secret()
    (tmp_path / "secret").chmod(mode)
    for read in (settings.root_secret, settings.shared_secret):
        with pytest.raises(SettingsError, match="chmod 600"):
            read()


def test_a_folder_accepts_only_the_secret_that_it_was_first_used_with(tmp_path: Path) -> None:
    assert Settings(data=tmp_path, secret="a" * 40).root_secret() == b"a" * 40
    assert Settings(data=tmp_path, secret="a" * 40).root_secret() == b"a" * 40
    with pytest.raises(SettingsError, match="POMELO_SECRET is not the secret that the keys"):
        Settings(data=tmp_path, secret="b" * 40).root_secret()
    with pytest.raises(SettingsError, match="secret is not the secret"):
        Settings(data=tmp_path).root_secret()


def test_a_configured_secret_equals_the_secret_file_of_another_machine(tmp_path: Path) -> None:
    stored = Settings(data=tmp_path / "a").root_secret()
    configured = Settings(data=tmp_path / "b", secret=stored.decode())
    assert configured.root_secret() == stored
    assert not (tmp_path / "b" / "secret").exists()


def test_a_missing_secret_file_is_not_recreated_if_there_are_keys(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    settings.database.write_bytes(b"keys")
    with pytest.raises(SettingsError, match="is missing"):
        settings.root_secret()
    assert not (tmp_path / "secret").exists()


def test_a_data_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="POMELO_DATA"):
        Settings(data=tmp_path / "file").root_secret()


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o750, 0o701])
@pytest.mark.parametrize("used", [False, True])
def test_access_of_others_to_a_data_folder_is_removed_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, used: bool
) -> None:
    data = tmp_path / "data"
    settings = Settings(data=data)
    secret = None
    if used:
        secret = settings.root_secret()
    else:
        data.mkdir()
        (data / "lost+found").mkdir()  # a new file system has this folder
    data.chmod(mode)
    caplog.clear()
    assert settings.root_secret() == secret or not used
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(data) in line
    assert f"{mode:04o}" in line
    caplog.clear()
    settings.root_secret()
    assert caplog.records == []


def test_an_open_folder_with_files_of_other_programs_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "diary").write_text("")
    tmp_path.chmod(0o755)
    with pytest.raises(SettingsError, match=f"chmod 700 {tmp_path}"):
        Settings(data=tmp_path).root_secret()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["diary"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_a_data_folder_of_another_user_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(SettingsError, match=r"another user \(uid 12345\).* chown -R 0 ") as caught:
        Settings(data=tmp_path).root_secret()
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_shared_secret_is_an_existing_one_and_none_is_created(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert Settings(data=data).shared_secret() is None
    assert Settings(data=data, secret="s" * 40).shared_secret() == b"s" * 40
    assert not data.exists()
    created = Settings(data=data).root_secret()
    assert Settings(data=data).shared_secret() == created
    assert Settings(data=data, secret="s" * 40).shared_secret() == b"s" * 40


def test_a_folder_that_can_not_be_read_has_no_shared_secret(tmp_path: Path) -> None:
    too_long = tmp_path / ("n" * 300)
    assert Settings(data=too_long).shared_secret() is None
    with pytest.raises(SettingsError, match="can't be used"):
        Settings(data=too_long).root_secret()


@pytest.mark.parametrize("name", ["secret", "secret-check"])
def test_the_error_for_a_file_that_can_not_be_read_names_it(tmp_path: Path, name: str) -> None:
    data = tmp_path / "data"
    Settings(data=data).root_secret()
    (data / name).unlink()
    (data / name).mkdir(mode=0o700)
    with pytest.raises(SettingsError, match=rf"POMELO_DATA: .*/data/{name} can't be used: Is a directory"):
        Settings(data=data).root_secret()


def test_a_folder_accepts_a_secret_that_replaces_its_own(tmp_path: Path) -> None:
    old, new = "a" * 40, "b" * 40
    Settings(data=tmp_path, secret=old).root_secret()
    with pytest.raises(SettingsError, match="POMELO_SECRET_PREVIOUS"):
        Settings(data=tmp_path, secret=new).root_secret()
    assert Settings(data=tmp_path, secret=new, secret_previous=("c" * 40, old)).root_secret() == new.encode()
    assert Settings(data=tmp_path, secret=new).root_secret() == new.encode()
    with pytest.raises(SettingsError, match="is not the secret"):
        Settings(data=tmp_path, secret=old).root_secret()


def test_a_secret_whose_variable_ends_with_a_line_end_can_be_replaced(tmp_path: Path) -> None:
    old, other = f"{'a' * 40}\n", f"{'c' * 40}\n"
    load(None, {"POMELO_DATA": str(tmp_path), "POMELO_SECRET": old}).root_secret()
    for previous in (old, f"{other}, {old}", f"{old},{other}"):
        variables = {"POMELO_SECRET": "b" * 40, "POMELO_SECRET_PREVIOUS": previous}
        load(None, variables | {"POMELO_DATA": str(tmp_path)}).check_secret()
    assert load(None, {"POMELO_SECRET_PREVIOUS": other}).secret_previous == ("c" * 40, other)
    with pytest.raises(SettingsError, match="32 characters"):
        load(None, {"POMELO_SECRET_PREVIOUS": f"{'a' * 31}\n"})


def test_the_secret_of_the_folder_is_replaced_in_its_file(tmp_path: Path) -> None:
    old = Settings(data=tmp_path).root_secret().decode()
    write_private(tmp_path / "secret", "n" * 64, replace=True)
    for read in (Settings.root_secret, Settings.shared_secret):
        with pytest.raises(SettingsError, match="is not the secret"):
            read(Settings(data=tmp_path))
    assert Settings(data=tmp_path, secret_previous=(old,)).shared_secret() == b"n" * 64
    assert Settings(data=tmp_path, secret_previous=(old,)).root_secret() == b"n" * 64
    assert Settings(data=tmp_path).shared_secret() == b"n" * 64


def test_a_secret_is_checked_without_a_change_of_its_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    Settings(data=data).check_secret()
    Settings(data=data, secret="a" * 40).check_secret()
    assert not data.exists()
    secret = Settings(data=data).root_secret().decode()
    noted = (data / "secret-check").read_text()
    Settings(data=data).check_secret()
    Settings(data=data, secret=secret).check_secret()
    with pytest.raises(SettingsError, match="POMELO_SECRET is not the secret that the keys"):
        Settings(data=data, secret="a" * 40).check_secret()
    Settings(data=data, secret="a" * 40, secret_previous=(secret,)).check_secret()
    write_private(data / "secret", "b" * 40, replace=True)
    with pytest.raises(SettingsError, match=r"data/secret is not the secret that the keys"):
        Settings(data=data).check_secret()
    (data / "secret").write_bytes(b"\xff")
    with pytest.raises(SettingsError, match=r"POMELO_DATA: .*data can't be used: it is not text"):
        Settings(data=data).check_secret()
    (data / "secret").unlink()
    with pytest.raises(SettingsError, match=r"data/secret is missing\. Restore it"):
        Settings(data=data).check_secret()
    assert (data / "secret-check").read_text() == noted
    assert [path.name for path in data.iterdir()] == ["secret-check"]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda data: (data / "secret").chmod(0o640), id="a secret that others can read"),
        pytest.param(lambda data: (data / "secret").write_text("short"), id="a damaged secret"),
        pytest.param(lambda data: (data / "secret").unlink(), id="no secret of a database"),
        pytest.param(lambda data: data.chmod(0o755), id="an open folder"),
        pytest.param(
            lambda data: (
                [path.rename(data / f"other-{path.name}") for path in data.iterdir()] and data.chmod(0o755)
            ),
            id="an open folder with files of other programs",
        ),
        pytest.param(
            lambda data: os.chown(data, 12345, -1),
            id="a folder of another user",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away"),
        ),
    ],
)
@pytest.mark.parametrize("noted", [True, False])
def test_the_check_finds_what_stops_a_start(
    tmp_path: Path, make: Callable[[Path], object], noted: bool
) -> None:
    settings = Settings(data=tmp_path / "data")
    settings.root_secret()
    settings.database.write_bytes(b"keys")
    if not noted:
        (settings.data / "secret-check").unlink()
    make(settings.data)
    refusals: list[str] = []
    for use in (settings.check_secret, settings.root_secret):
        try:
            use()
        except SettingsError as error:
            refusals.append(str(error))
    assert len(refusals) in (0, 2)
    assert len(set(refusals)) <= 1


def test_the_files_of_the_data_folder_have_their_names(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in (settings.admin_socket, settings.key_file)]
    assert names == ["admin.sock", "test-key"]
