"""What `pomelo doctor --fleet` says about the processes of several machines."""

from __future__ import annotations

from pomelo.cli.fleet import _processes, _shared
from pomelo.configuration.fleet import FACTS
from pomelo.stores.fleet import Process


def test_a_host_is_named_with_its_processes_and_the_start_of_the_oldest() -> None:
    found = _processes([Process(host, at, 0.0, {}) for host, at in (("a", 0.0), ("b", 60.0), ("a", 120.0))])
    assert found.detail.splitlines() == [
        "3 on 2 hosts",
        "a: 2, since 1970-01-01T00:00:00Z",
        "b: 1, since 1970-01-01T00:01:00Z",
    ]


def test_a_rotation_of_the_root_secret_is_ok_while_all_accept_each_other() -> None:
    def using(host: str, secret: str, previous: str) -> Process:
        return Process(host, 0.0, 0.0, {"secret": secret, "previous secrets": previous})

    (secret,) = (fact for fact in FACTS if fact.name == "secret")
    prepared, rotated, new = using("a", "1", "2"), using("b", "2", "1"), using("c", "2", "")
    found = _shared(secret, [prepared, rotated])
    assert (found.state, found.detail.splitlines()) == (
        "ok",
        ["each accepts the others'. Finish the rotation", "1: a", "2: b"],
    )
    assert _shared(secret, [rotated, new]).state == "ok"
    found = _shared(secret, [prepared, rotated, new])  # a and c
    assert (found.state, found.detail.splitlines()) == ("broken", [secret.remedy, "1: a", "2: b, c"])


def test_what_an_older_version_does_not_report_is_no_difference() -> None:
    (media,) = (fact for fact in FACTS if fact.name == "media")
    old, new = Process("a", 0.0, 0.0, {}), Process("b", 0.0, 0.0, {"media": "s3://bucket"})
    found = _shared(media, [old, new])
    assert (found.state, found.detail.splitlines()) == (
        "ok",
        ["not yet everywhere", "unknown to its version: a", "s3://bucket: b"],
    )
