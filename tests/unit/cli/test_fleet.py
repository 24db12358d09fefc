"""What `pomelo doctor --fleet` says about the processes of several machines."""

from __future__ import annotations

from pomelo.cli.fleet import _processes
from pomelo.stores.fleet import Process


def test_a_host_is_named_with_its_processes_and_the_start_of_the_oldest() -> None:
    found = _processes([Process(host, at, 0.0, {}) for host, at in (("a", 0.0), ("b", 60.0), ("a", 120.0))])
    assert found.detail.splitlines() == [
        "3 on 2 hosts",
        "a: 2, since 1970-01-01T00:00:00Z",
        "b: 1, since 1970-01-01T00:01:00Z",
    ]
