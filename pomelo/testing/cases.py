"""The test cases of a provider: each of its jobs, without a fault, with each fault and each disconnect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pomelo.providers import Credentials
from pomelo.providers.base import Job
from pomelo.providers.http.client import Http
from pomelo.testing.broken import FaultMaker, before_body, before_head, held_half_way
from pomelo.testing.faults import FAULTS, OK, VENDOR_SPECIFIC, Fault
from pomelo.testing.reply import Gate, Script, VendorProtocol
from pomelo.testing.samples import task_type_of
from pomelo.testing.upstream import FaultUpstream

DISCONNECTED = "disconnected"
"""In place of a code: the caller has disconnected."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A provider to test.

    `make` creates it from credentials and an `Http`; `base_url` returns its base URL on the server. The
    `default` of its `protocol` replies to each of the `jobs`. `cost` is what the provider must report for
    each valid response, in US dollars; None: that is not checked. `counts_tokens` is False if the vendor does
    not count the tokens of a text: Pomelo then estimates them.
    """

    name: str
    make: Callable[[Credentials, Http], Any]
    base_url: Callable[[FaultUpstream], str]
    protocol: VendorProtocol
    jobs: Sequence[Job[Any]]
    cost: int | float | Decimal | None = None
    counts_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """A test case: `job`, whole or streamed, with or without a fault or a disconnect of the caller.

    `disconnects` is "", "before the head", "after the head", "half way" or "after an event".
    """

    subject: Subject
    job: Job[Any]
    stream: bool
    fault: Fault | None = None
    disconnects: str = ""

    @property
    def task_type(self) -> str:
        """The task type, as providers name their methods."""
        return task_type_of(self.job)

    @property
    def expected(self) -> str:
        """The expected code; OK or DISCONNECTED without an error."""
        if self.fault is not None:
            return self.fault.code(self.stream)
        return DISCONNECTED if self.disconnects else OK

    def script(self, gate: Gate) -> Script:
        """What the vendor replies. If the caller disconnects, the response is held at `gate`."""
        if self.fault is not None:
            return self.fault.script(self.subject.protocol, self.task_type)
        valid = self.subject.protocol.default
        if not self.disconnects or (self.task_type == "image" and self.disconnects == "after an event"):
            return valid
        return _HOLDS[self.disconnects](gate)(self.subject.protocol, valid)

    def __str__(self) -> str:
        what = (
            self.fault.name
            if self.fault
            else f"disconnect {self.disconnects}"
            if self.disconnects
            else "no fault"
        )
        return f"{self.subject.name} {self.task_type} {'stream' if self.stream else 'whole'}: {what}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a case. `delivered` are bytes of output; `problems` are sentences, none if it passed."""

    case: Case
    code: str
    seconds: float
    events: int
    delivered: int
    problems: tuple[str, ...]

    def check(self) -> None:
        """Check that the case passed.

        Raises:
            AssertionError: it failed; the message has every problem.
        """
        if self.problems:
            raise AssertionError(f"{self.case}: {'; '.join(self.problems)}")


_HOLDS: Mapping[str, Callable[[Gate], FaultMaker]] = {
    "before the head": before_head,
    "after the head": before_body,
    "half way": held_half_way,
    "after an event": held_half_way,
}
"""When a caller disconnects -> where the vendor holds its response meanwhile."""


def cases(subject: Subject) -> list[Case]:
    """Return all cases of a provider: each of its jobs, whole and streamed, without a fault, with each
    possible fault, and with each disconnect.

    Raises:
        ValueError: the protocol defines an unknown fault.
    """
    for task_type, faults in subject.protocol.faults.items():
        unknown = sorted((faults.scripts.keys() | faults.unsupported.keys()) - VENDOR_SPECIFIC)
        if unknown:
            name = subject.protocol.name
            raise ValueError(f"{name}, {task_type}: no fault is called {', '.join(unknown)}")
    found = []
    for job in subject.jobs:
        for stream in (False, True):
            found.append(Case(subject, job, stream))
            found += [
                Case(subject, job, stream, fault)
                for fault in FAULTS
                if not fault.unsupported_reason(subject.protocol, task_type_of(job), stream)
            ]
            disconnects = list(_HOLDS)
            if not stream or task_type_of(job) == "speech_to_text":
                disconnects.remove("after an event")
            found += [Case(subject, job, stream, disconnects=when) for when in disconnects]
    return found
