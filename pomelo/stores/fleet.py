"""The serving processes that share a store, and what each of them is configured with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self, runtime_checkable

MAX_CLOCK_DIFFERENCE = 5.0
"""Seconds by which a host's clock may differ from the store's: links and headers show times."""


@dataclass(frozen=True, slots=True)
class Process:
    """A serving process. `started` is Unix time in seconds.

    `clock` are the seconds by which the host's clock is ahead of the store's. `facts` is what all processes
    must share, by name: texts that may be shown, and fingerprints of what may not.
    """

    host: str
    started: float
    clock: float
    facts: Mapping[str, str]

    def encode(self) -> str:
        """The process as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The process in JSON of this or another version.

        Raises:
            ValueError: it is not one.
        """
        try:
            values: dict[str, Any] = json.loads(data)
            facts = {str(name): str(value) for name, value in values["facts"].items()}
            return cls(str(values["host"]), float(values["started"]), float(values["clock"]), facts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("not a process") from error


@runtime_checkable
class Fleet(Protocol):
    """A store that several processes may have open."""

    async def register(self, process: Process) -> list[Process]:
        """Lists this process until it ends, in place of its former entry. Returns the others.

        Raises:
            PomeloError: store_unavailable.
        """
        ...

    def drain_usage(self, on_failure: Callable[[], None] = ...) -> None:
        """Starts to move usage records to the archive, also those of other processes. Only a process that
        serves does it: a command could have a different archive. `on_failure` is called each time that the
        archive fails."""
        ...

    async def clock_ahead(self) -> float:
        """The seconds by which this host's clock is ahead of the store's.

        Raises:
            PomeloError: store_unavailable.
        """
        ...

    async def note_state(self, subject: str, state: str, seconds: float) -> bool:
        """Notes the state of a subject for all processes, for that many seconds. Returns whether it has
        changed: of the processes that note the same change, only the first gets True.

        Raises:
            PomeloError: store_unavailable.
        """
        ...
