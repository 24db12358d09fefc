"""What servers must share: fingerprints, and differences."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pomelo.configuration import read_configuration
from pomelo.configuration.fleet import (
    check_server,
    describe_process,
    differences,
    fingerprint,
    join,
    mark_media,
)
from pomelo.settings import Settings, SettingsError
from pomelo.stores.fleet import Process

SECRET = "the root secret of all of the machines"
ANOTHER = "another root secret of some of the machines"


def described(folder: Path, secret: str = SECRET, **settings: Any) -> Process:
    made = Settings(data=folder, secret=secret, **settings)
    return describe_process(made, read_configuration(made), made.secret.encode(), 0.0, 0.0)


def changes(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    catalog = folder / "own.toml"
    catalog.write_text('[voices]\nadam = "another-voice"\n')
    yield "secret", {"secret": ANOTHER}
    yield "catalogue", {"catalog": catalog}
    yield "plans", {"plans": {"free": {"requests_per_minute": 7}}}
    yield "media", {"media": "s3://bucket/prefix"}
    yield "archive", {"archive": "postgresql://pomelo:hunter2@db.internal:5432/usage"}
    yield "public URL", {"public_url": "https://api.example"}
    yield "providers", {"openai_api_key": "sk-hunter2"}
    yield "providers", {"vllm_base_url": "http://10.0.0.5:8000/v1"}  # it needs no key


def test_each_setting_that_must_be_shared_is_compared_and_nothing_secret_is_shown(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"store": "redis://127.0.0.1:1"}
    own = described(tmp_path, **shared)
    assert differences(own, described(tmp_path, **shared)) == []
    for name, change in changes(tmp_path):
        other = described(tmp_path, **{**shared, **change})
        assert [fact.name for fact in differences(own, other)] == [name]
        shown = other.encode()
        assert "hunter2" not in shown
        assert "root secret" not in shown
        assert str(tmp_path) not in shown
    assert own.facts["secret"] != described(tmp_path, ANOTHER).facts["secret"]


@pytest.mark.parametrize(
    ("lives", "replaced", "refused", "looks"),
    [
        (True, "", True, [False, True]),
        (False, "", False, [False, True]),  # it was killed, and is still listed
        (True, "its host", False, [False]),
    ],
)
async def test_a_server_with_another_secret_may_join_only_those_that_do_not_live(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lives: bool,
    replaced: str,
    refused: bool,
    looks: list[bool],
) -> None:
    looked: list[bool] = []

    async def read_fleet(url: str, *, living: bool) -> list[Process]:
        looked.append(living)
        return [replace(described(tmp_path, ANOTHER), host="its host")] if lives or not living else []

    monkeypatch.setattr("pomelo.configuration.fleet.read_fleet", read_fleet)
    checking = check_server(Settings(data=tmp_path, secret=SECRET), replaced=replaced)
    if refused:
        with pytest.raises(SettingsError, match="its host has the same store and another root secret"):
            await checking
    else:
        await checking
    assert looked == looks


def test_two_secrets_are_no_difference_while_each_process_accepts_the_others(tmp_path: Path) -> None:
    old = described(tmp_path)
    prepared = described(tmp_path, secret_previous=ANOTHER)
    rotated = described(tmp_path, ANOTHER, secret_previous=SECRET)
    new = described(tmp_path, ANOTHER)
    for one, other in ((old, prepared), (prepared, rotated), (rotated, new)):
        assert differences(one, other) == differences(other, one) == []
    for one, other in ((old, rotated), (prepared, new), (old, new)):
        assert [fact.name for fact in differences(one, other)] == ["secret"]
        assert [fact.name for fact in differences(other, one)] == ["secret"]


def test_a_fact_that_another_version_does_not_have_is_no_difference(tmp_path: Path) -> None:
    own = described(tmp_path)
    older = replace(own, facts={"secret": own.facts["secret"], "version": "0.0.9"})
    assert [fact.name for fact in differences(own, older)] == ["version"]
    assert [fact.name for fact in differences(older, own)] == ["version"]


def test_disks_of_two_folders_differ(tmp_path: Path) -> None:
    first, second = described(tmp_path / "a"), described(tmp_path / "b")
    assert [fact.name for fact in differences(first, second)] == ["media"]


def test_machines_that_share_the_folder_of_media_share_its_media(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    first, second, other = (Settings(data=tmp_path / name, secret=SECRET) for name in "abc")
    for each in (first, second, other):
        each.data.mkdir()
        (each.data / "secret-check").touch()
    for each in (first, second):
        (each.data / "media").symlink_to(tmp_path / "shared")
    for each in (first, second, other):
        mark_media(each)
    assert differences(described(first.data), described(second.data)) == []
    (shared,) = (tmp_path / "shared").iterdir()
    before = described(first.data)
    mark_media(second)
    (tmp_path / "shared" / "another").touch()
    assert differences(before, described(second.data)) == []
    assert [fact.name for fact in differences(before, described(other.data))] == ["media"]
    assert shared.stat().st_mode & 0o777 == 0o600


def test_a_bucket_gets_no_folder_of_media(tmp_path: Path) -> None:
    mark_media(Settings(data=tmp_path, secret=SECRET, media="s3://bucket/prefix"))
    assert list(tmp_path.iterdir()) == []


def test_containers_that_share_a_file_share_its_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def archive(path: Path) -> Process:
        return described(tmp_path, store="redis://127.0.0.1:1", media="s3://b", archive=f"sqlite:{path}")

    for name in ("shared", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "usage.db").touch()
    (tmp_path / "mounted").symlink_to("shared")
    first = archive(tmp_path / "shared" / "usage.db")
    monkeypatch.setattr("socket.gethostname", lambda: "another-container")
    (tmp_path / "shared" / "usage.db").write_text("records")
    assert differences(first, archive(tmp_path / "mounted" / "usage.db")) == []
    assert [fact.name for fact in differences(first, archive(tmp_path / "other" / "usage.db"))] == ["archive"]
    assert [fact.name for fact in differences(first, archive(tmp_path / "missing.db"))] == ["archive"]


def test_archives_in_postgres_differ_by_their_place_and_not_by_who_connects(tmp_path: Path) -> None:
    def archive(url: str) -> str:
        return described(tmp_path, store="redis://127.0.0.1:1", archive=url).facts["archive"]

    first = archive("postgresql:///pomelo?host=/run/a&user=ann&password=hunter2")
    assert "hunter2" not in first
    assert first == archive("postgresql:///pomelo?host=/run/a&user=bob&sslmode=require")
    assert first != archive("postgresql:///pomelo?host=/run/b&user=ann&password=hunter2")
    assert first != archive("postgresql:///other?host=/run/a")


def test_an_archive_in_a_file_is_the_same_by_each_of_its_paths(tmp_path: Path) -> None:
    for name in ("usage.db", "another.db"):
        (tmp_path / name).touch()
    (tmp_path / "link.db").symlink_to("usage.db")
    own, same, other = [
        described(tmp_path, store="redis://127.0.0.1:1", archive=f"sqlite:{tmp_path / name}")
        for name in ("usage.db", "link.db", "another.db")
    ]
    assert differences(own, same) == []
    assert [fact.name for fact in differences(own, other)] == ["archive"]


@pytest.mark.parametrize("seed", ["1", "2"])
def test_fingerprints_are_the_same_in_every_process(tmp_path: Path, seed: str) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.unit.configuration.test_fleet import described; "
        "print(described(Path(sys.argv[1])).encode())"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, env={"PYTHONHASHSEED": seed}, cwd=root, capture_output=True, check=True)
    assert json.loads(ran.stdout)["facts"] == described(tmp_path).facts


def test_equal_sets_and_mappings_have_equal_fingerprints() -> None:
    assert fingerprint({"a": frozenset("xyz"), "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": set("zyx")})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_what_does_not_count_for_equality_does_not_count_for_a_fingerprint() -> None:
    @dataclass
    class Entry:
        name: str
        opened: object = field(default_factory=object, compare=False)

    assert fingerprint(Entry("a")) == fingerprint(Entry("a")) != fingerprint(Entry("b"))


class Others:
    """A store that other processes have open, too."""

    def __init__(self, *others: Process) -> None:
        self.others = list(others)
        self.registered: list[Process] = []

    async def register(self, process: Process) -> list[Process]:
        self.registered.append(process)
        return self.others

    def drain_usage(self, on_failure: Callable[[], None] = lambda: None) -> None: ...

    async def clock_ahead(self) -> float:
        return 0.0

    async def note_state(self, subject: str, state: str, seconds: float) -> bool:
        return True


async def test_a_process_that_joins_logs_each_difference_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = described(tmp_path)
    other = replace(own, host="other", facts={**own.facts, "plans": "x", "alerts": "y"})
    fleet = Others(own, other, replace(other, started=1.0), replace(other, host="third"))
    await join(fleet, own, warn=False)
    assert (fleet.registered, caplog.messages) == ([own], [])
    await join(fleet, own, warn=True)
    assert caplog.messages == [
        f"This server, on {own.host}, and the one on {host} differ in: plans, alerts. That is normal during a "
        "change. See: pomelo doctor --fleet"
        for host in ("other", "third")
    ]


@pytest.mark.parametrize("warn", [True, False])
async def test_a_process_with_another_root_secret_does_not_join(tmp_path: Path, warn: bool) -> None:
    own, other = described(tmp_path), replace(described(tmp_path, ANOTHER), host="other")
    with pytest.raises(SettingsError, match="The server on other has the same store and another root secret"):
        await join(Others(own, other), own, warn=warn)
