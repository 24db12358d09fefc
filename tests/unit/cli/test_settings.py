"""Settings as commands load them: the bounds of each value, lists, precedence, and what is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomelo import secrets
from pomelo.settings import ProviderSettings, Settings, SettingsError, load

REDIS = {"POMELO_STORE": "redis://127.0.0.1"}
SHORT = "s" * (secrets.MIN_LENGTH - 1)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("WORKERS", ("1", "64"), ("0", "65")),
        ("MAX_CALLS", ("1", "1000000"), ("0", "1000001")),
        ("MAX_CONNECTIONS", ("8", "1000000"), ("7", "1000001")),
        ("UPSTREAM_CONNECTIONS", ("1", "65536"), ("0", "65537")),
        ("GRACE", ("0", "3600"), ("-0.1", "3600.1")),
        ("DRAIN_DELAY", ("0", "600"), ("-0.1", "600.1")),
        ("IDLE_TIMEOUT", ("1", "86400"), ("0.9", "86400.1")),
        ("JSON_LIMIT", ("1", "512MiB"), ("0", "536870913")),
        ("UPLOAD_LIMIT", ("1",), ("0",)),
        ("INLINE_LIMIT", ("1", "512MiB"), ("0", "536870913")),
        ("MEDIA_LIMIT", ("1",), ("0",)),
        ("MEDIA_ACCOUNT_LIMIT", ("1",), ("0",)),
        ("DISK_RESERVE", ("0",), ("-1",)),
        ("SECRET", (SHORT + "s",), (SHORT,)),
        (
            "ARCHIVE",
            (
                *(
                    "sqlite:a.db",
                    "sqlite:/a?b#c",
                    "postgresql://a/b",
                    "postgresql://u:a@b%2F@a:5432/b?sslmode=require",
                ),
                *(
                    "postgresql://u@a,b:1,[::1]:2/c",
                    "postgresql:///b?host=/run/a&user=me@here",
                    "postgresql://a",
                ),
            ),
            (
                *("postgres://a/b", "a.db", "postgresql://u:pass/word@a/b", "postgresql://u:1/2@a/b"),
                *("postgresql://u:pass#word@a/b", "postgresql://u:pass?word@a/b", "postgresql://u:1?2@a/b"),
                *("postgresql://u:pass[word@a/b", "postgresql://a:port/b"),
            ),
        ),
        (
            "STORE",
            (
                *("sqlite:", "redis://a", "rediss://a", "redis+cluster://a", "redis+sentinel://a/b"),
                *("rediss+cluster://a", "rediss+sentinel://a/b"),
            ),
            ("sqlite:a.db", "memcached://a"),
        ),
    ],
)
def test_values_at_a_bound_are_accepted_and_values_beyond_it_refused(
    name: str, accepted: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    for value in accepted:
        load(None, REDIS | {f"POMELO_{name}": value})
    for value in refused:
        with pytest.raises(SettingsError, match=f"^POMELO_{name}: "):
            load(None, REDIS | {f"POMELO_{name}": value})


def test_a_name_of_a_plan_has_at_most_64_characters(tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
    config.write_text(f"[plans.{'p' * 64}]\n")
    assert list(load(config, {}).plans) == ["p" * 64]
    config.write_text(f"[plans.{'p' * 65}]\n")
    with pytest.raises(SettingsError, match="1 to 64 letters"):
        load(config, {})


def test_empty_parts_of_a_list_are_ignored() -> None:
    settings = load(None, {"POMELO_TRUSTED_PROXIES": "10.0.0.0/8, ,127.0.0.1,"})
    assert settings.trusted_proxies == ("10.0.0.0/8", "127.0.0.1")


def test_the_option_of_workers_overrides_the_file_and_the_variable(tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
    config.write_text("workers = 2\n")
    environ = REDIS | {"POMELO_WORKERS": "3"}
    assert load(config, REDIS).workers == 2
    assert load(config, environ).workers == 3
    assert load(config, environ, workers=4).workers == 4


def test_the_byte_order_mark_of_a_file_is_skipped(tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
    config.write_text("\ufeffgrace = 3\n", "utf-8")
    assert load(config, {}).grace == 3


def test_an_empty_data_folder_of_a_file_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
    config.write_text('data = ""\n')
    with pytest.raises(SettingsError, match=r"^POMELO_DATA: must be a folder, such as \.pomelo$"):
        load(config, {})


def test_usage_records_move_to_the_archive_that_is_set_or_to_the_data_folder() -> None:
    assert load(None, {}).archive_url() == ""
    assert load(None, {"POMELO_ARCHIVE": "sqlite:a.db"}).archive_url() == ""
    assert load(None, REDIS | {"POMELO_ARCHIVE": "sqlite:a.db"}).archive_url() == "sqlite:a.db"
    assert load(None, REDIS).archive_url() == f"sqlite:{Path('.pomelo') / secrets.ARCHIVE}"


@pytest.mark.parametrize("password", ["pass/word", "pass?word", "pass#word", "pass[word"])
def test_a_password_that_breaks_the_url_of_the_archive_is_not_shown(password: str) -> None:
    with pytest.raises(SettingsError, match="In a password, write / ") as caught:
        load(None, REDIS | {"POMELO_ARCHIVE": f"postgresql://u:{password}@127.0.0.1/b"})
    assert password not in str(caught.value)


def test_the_representation_of_settings_has_no_key_and_no_password_of_a_database() -> None:
    assert "sk-hidden" not in repr(ProviderSettings(api_key="sk-hidden"))
    settings = Settings(
        store="redis://:hidden@a",
        archive="postgresql://u:hidden@a/b",
        secret="hidden" * 8,
        variables={"ACME_API_KEY": "hidden"},
        providers={"acme": ProviderSettings(api_key="hidden")},
    )
    assert "hidden" not in repr(settings)
