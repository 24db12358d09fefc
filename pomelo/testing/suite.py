"""The contract of providers, as cases that run over any of them: built in, or of another package.

    subject = Subject("acme", Acme, lambda upstream: upstream.url + "/acme", ACME_WIRE,
                      jobs=(sample("text", Route("acme", "acme-large-2")),))

    @pytest.mark.parametrize("case", cases(subject), ids=str)
    async def test_acme(case: Case) -> None:
        (await run(case)).check()

No test framework is needed. Each case has a server and a provider of its own, on loopback; what is left when
it is over (connections, asyncio tasks, files) is looked for in the whole process: one case runs at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from pomelo.catalog.reported_cost import Report
from pomelo.errors import PomeloError
from pomelo.providers import Credentials
from pomelo.providers.base import Job, fit_hook, fit_job, job_method
from pomelo.providers.errors import CODES
from pomelo.providers.http.client import Http, Timeouts
from pomelo.testing.addresses import Unresolving
from pomelo.testing.broken import ASTRAY, BODY, Breaking, ahead, first, held
from pomelo.testing.faults import FAULTS, LATE, OK, WORDED, Fault
from pomelo.testing.leftovers import closed, nothing_left, shown
from pomelo.testing.reading import Reading
from pomelo.testing.reply import Gate, Script, Wire
from pomelo.testing.samples import PROMPT, SOUND, kind_of, sample
from pomelo.testing.upstream import FaultUpstream

__all__ = [
    "AT_ONCE",
    "CODES",
    "DEADLINE",
    "KEY",
    "LEFT",
    "LENIENCE",
    "LIMIT",
    "PROMPT",
    "SECRETS",
    "SOUND",
    "TRIES",
    "Case",
    "Subject",
    "Verdict",
    "cases",
    "kind_of",
    "run",
    "sample",
]

KEY = "key-canary-2718"
SECRETS = (KEY, PROMPT, BODY.split()[0], "a canary sound")
"""The key, the caller's input and the vendor's body; none of it may be in what a failure shows."""

LIMIT = 0.15
"""Seconds of the limits of silence that the provider's `Http` has, and of a connection where none is made."""

DEADLINE = 0.3
"""Seconds of the caller's deadline where nothing else ends a fault."""

PROMPTLY = 3.0
"""Seconds for what neither a limit nor a deadline has to end."""

LENIENCE = 0.25
"""Seconds by which a limit may be overrun."""

AT_ONCE = 0.05
"""Seconds from a caller's leaving to the end of its connections."""

TRIES = 3

_PATIENCE = 0.5  # seconds after a case until what it left is a leak
_LONGEST = 10.0  # seconds that a case may take at all

LEFT = "left"
"""In place of a code: the caller has left."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A provider to examine.

    `make` makes it as `open_providers` does, `base_url` says where the server plays its vendor, in the form
    that its credentials take. `wire` is the vendor's; its `default` answers each of the `jobs`. `cost` is
    what the provider has to report of each good answer, in US dollars; with None that is not examined.
    """

    name: str
    make: Callable[[Credentials, Http], Any]
    base_url: Callable[[FaultUpstream], str]
    wire: Wire
    jobs: Sequence[Job[Any]]
    cost: int | float | Decimal | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to see: `job`, whole or streamed, with a fault or without, or left by its caller.

    `leaves` is "", "before the head", "after the head", "half way" or "after an event".
    """

    subject: Subject
    job: Job[Any]
    stream: bool
    fault: Fault | None = None
    leaves: str = ""

    @property
    def kind(self) -> str:
        """The kind of task, as providers name their methods."""
        return kind_of(self.job)

    @property
    def expected(self) -> str:
        """The code of the outcome; OK or LEFT where there is none."""
        if self.fault is not None:
            return self.fault.code(self.stream)
        return LEFT if self.leaves else OK

    def __str__(self) -> str:
        what = self.fault.name if self.fault else f"left {self.leaves}" if self.leaves else "a good answer"
        return f"{self.subject.name} {self.kind} {'stream' if self.stream else 'whole'}: {what}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a case. `delivered` are bytes of the output; `problems` are sentences, none where all is
    as it should be."""

    case: Case
    code: str
    seconds: float
    events: int
    delivered: int
    problems: tuple[str, ...]

    def check(self) -> None:
        """Does nothing where all is as it should be.

        Raises:
            AssertionError: it isn't; the message has every problem.
        """
        if self.problems:
            raise AssertionError(f"{self.case}: {'; '.join(self.problems)}")


_HELD: Mapping[str, Callable[[Gate], Breaking]] = {
    "before the head": ahead,
    "after the head": first,
    "half way": held,
    "after an event": held,
}
"""Where a caller leaves -> where the vendor holds its answer meanwhile."""


def cases(subject: Subject) -> list[Case]:
    """Every case of a provider: a good answer, each fault that can be, each way to leave; of each of its
    jobs, whole and streamed. `pomelo.testing.faults.left_out` tells which faults can't be.

    Raises:
        ValueError: the wire has words for a fault that nobody knows.
    """
    for kind, wording in subject.wire.wordings.items():
        unknown = sorted((wording.said.keys() | wording.lacks.keys()) - WORDED)
        if unknown:
            raise ValueError(f"{subject.wire.name}, {kind}: no fault is called {', '.join(unknown)}")
    found = []
    for job in subject.jobs:
        for stream in (False, True):
            found.append(Case(subject, job, stream))
            found += [
                Case(subject, job, stream, fault)
                for fault in FAULTS
                if not fault.absence(subject.wire, kind_of(job), stream)
            ]
            ways = list(_HELD)
            if not stream or kind_of(job) == "speech_to_text":
                ways.remove("after an event")
            found += [Case(subject, job, stream, leaves=way) for way in ways]
    return found


async def run(case: Case) -> Verdict:
    """Runs a case; never raises for what the provider does. One in which nothing but a time is wrong is run
    again, TRIES times in all, so that a busy machine fails nobody."""
    for _ in range(TRIES):
        problems: list[str] = []
        async with (
            nothing_left(problems, within=_PATIENCE),
            FaultUpstream(wires=(case.subject.wire,)) as upstream,
        ):
            this = _Run(case, upstream, problems)
            outcome = await this.outcome()
            if not await closed(upstream, within=_PATIENCE):
                problems.append("connections are open after the provider was closed")
        if problems or not this.late:
            break
    return replace(outcome, problems=(*problems, *this.late))


class _Run:
    """One case while it runs."""

    def __init__(self, case: Case, upstream: FaultUpstream, problems: list[str]) -> None:
        self._case = case
        self._upstream = upstream
        self._problems = problems
        counted = case.fault is None or not case.fault.uncounted
        self._reading = Reading(case.kind, stream=case.stream, counted=counted)
        self._gate = Gate()
        self.late: list[str] = []
        """What is wrong with its times, apart from all other problems."""

    async def outcome(self) -> Verdict:
        """What came of it; what is wrong is added to the problems."""
        case, fault = self._case, self._case.fault
        self._upstream.default = self._script()
        base = case.subject.base_url(self._upstream)
        astray = fault is not None and fault.address is not None
        address = nullcontext(base) if fault is None or fault.address is None else fault.address(base)
        limits = Timeouts(connect=LIMIT if astray else _LONGEST, silence=LIMIT, whole=LIMIT)
        with address as url:
            async with Http(limits, resolver=Unresolving()) as http:
                provider = case.subject.make(Credentials(KEY, url), http)
                if not provider.configured:
                    self._problems.append("it has a key and an address, and is not configured")
                loop = asyncio.get_running_loop()
                began = loop.time()
                code = await (self._leave(provider) if case.leaves else self._read(provider))
                seconds = loop.time() - began
                self._judge(code, seconds)
                await self._idle()
                if not astray:
                    await self._recover(provider)
                await provider.aclose()
                await provider.aclose()
        return Verdict(case, code, seconds, self._reading.events, self._reading.delivered, ())

    def _script(self) -> Script:
        case = self._case
        if case.fault is not None:
            return case.fault.script(case.subject.wire, case.kind)
        good = case.subject.wire.default
        if not case.leaves or (case.kind == "image" and case.leaves == "after an event"):
            return good
        return _HELD[case.leaves](self._gate)(case.subject.wire, good)

    async def _read(self, provider: Any) -> str:
        """Reads the answer to its end as the engine does; gives the code that it ends in."""
        case, reading, problems = self._case, self._reading, self._problems
        ask, job = self._asked(provider)
        deadline = asyncio.timeout_at(job.deadline)
        try:
            async with deadline, aclosing(ask(job)) as events:
                async for event in events:
                    reading.add(event)
                    if reading.events % 2:
                        await asyncio.sleep(0)  # a reader that is now ahead of the vendor, now behind
                await self._end(events)
            reading.end()
            code = OK
            if case.fault is None and case.subject.cost is not None:
                reading.reported(job.report.cost, case.subject.cost)
        except PomeloError as error:
            code = error.code
            self._failed(error)
        except TimeoutError as error:
            code = LATE if deadline.expired() else _foreign(error, problems)
            reading.fail()
        except Exception as error:
            code = _foreign(error, problems)
            reading.fail()
        problems += reading.problems
        return code

    async def _recover(self, provider: Any) -> None:
        """What is over is over: the next task of the same provider has a good answer."""
        self._upstream.default = self._case.subject.wire.default
        for _ in range(3):
            await asyncio.sleep(0)  # turns of the loop, for what the vendor has sent meanwhile
        good = _Run(replace(self._case, fault=None, leaves=""), self._upstream, [])
        code = await good._read(provider)
        if code != OK or good._problems:
            told = self.late if code == LATE else self._problems
            told.append(f"the next task ends in {code}: {'; '.join(good._problems)}")

    async def _leave(self, provider: Any) -> str:
        """Reads as far as the case wants, and leaves."""
        ask, job = self._asked(provider)
        events = ask(job)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_LONGEST):
                if self._case.leaves == "after an event":
                    self._reading.add(await anext(events))
                    since = loop.time()
                    await events.aclose()
                else:
                    since = await self._cancelled(events)
                await self._idle(since)
        except TimeoutError:
            self._problems.append("it never came to the place where its caller leaves")
        except Exception as error:
            _foreign(error, self._problems)
        finally:
            await events.aclose()
        self._problems += self._reading.problems
        return LEFT

    async def _cancelled(self, events: Any) -> float:
        """Cancels whoever reads when the vendor has come to the gate; gives when."""

        async def collect() -> None:
            async with aclosing(events):
                async for event in events:
                    self._reading.add(event)

        reader = asyncio.create_task(collect())
        reached = asyncio.create_task(self._gate.reached.wait())
        await asyncio.wait((reader, reached), return_when=asyncio.FIRST_COMPLETED)
        if reader.done():
            reached.cancel()
            await asyncio.wait((reached,))
            self._problems.append("it ended before the vendor's answer was there")
            reader.exception()
            return asyncio.get_running_loop().time()
        since = asyncio.get_running_loop().time()
        reader.cancel()
        done, _ = await asyncio.wait((reader,), timeout=1)
        if not done:
            self._problems.append("it goes on a second after it was cancelled")
        elif not reader.cancelled():
            self._problems.append("it swallowed its cancelling")
            reader.exception()
        return since

    async def _idle(self, since: float | None = None) -> None:
        """Waits until the vendor serves nothing any more: all was read, or left at once."""
        since = asyncio.get_running_loop().time() if since is None else since
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self._upstream.idle()
        ends = [received.left_at for received in self._upstream.requests if received.left_at is not None]
        late = max((end - since for end in ends), default=0.0)
        if self._upstream.serving:
            self._problems.append("a connection to the vendor was not closed")
        elif late > AT_ONCE:
            self.late.append(f"a connection to the vendor was closed {late * 1000:.0f} ms late")

    async def _end(self, events: Any) -> None:
        """An answer that has ended stays so."""
        with contextlib.suppress(StopAsyncIteration):
            await anext(events)
            self._problems.append("an event comes after the end")

    def _asked(self, provider: Any) -> tuple[Any, Job[Any]]:
        ask = job_method(provider, self._case.kind)
        if ask is None:
            raise LookupError(f"{self._case.subject.name} has no method {self._case.kind}")
        fault = self._case.fault
        seconds = DEADLINE if fault is not None and fault.endless else _LONGEST
        deadline = asyncio.get_running_loop().time() + seconds
        job = fit_job(self._case.job, fit_hook(provider, self._case.kind))
        return ask, replace(job, stream=self._case.stream, deadline=deadline, report=Report())

    def _failed(self, error: PomeloError) -> None:
        self._reading.fail()
        fault = self._case.fault
        if error.code not in CODES:
            self._problems.append(f"{error.code} is no code of a provider's")
        if fault is not None and fault.wait is not None and error.retry_after != fault.wait:
            self._problems.append(f"its Retry-After is {error.retry_after}, and should be {fault.wait}")
        told = shown(error)
        for secret in SECRETS:
            if secret in told:
                self._problems.append(f"the error shows {secret!r}")

    def _judge(self, code: str, seconds: float) -> None:
        case, fault, problems = self._case, self._case.fault, self._problems
        if code != case.expected:
            (self.late if code == LATE else problems).append(
                f"it ends in {code}, and should end in {case.expected}"
            )
        if any(received.path == ASTRAY for received in self._upstream.requests):
            problems.append("it went where a link or a redirect led it astray")
        asked = Counter((r.method, r.target) for r in self._upstream.requests if r.method != "GET")
        for (_, target), times in asked.items():
            if times > 1:
                problems.append(f"{target} was asked {times} times, which is the router's to decide")
        if fault is None:
            return
        most = (LIMIT if fault.stalls else DEADLINE if fault.endless else PROMPTLY) + LENIENCE
        if seconds > most:
            self.late.append(f"it ends after {seconds:.2f} s, and should within {most:.2f} s")
        said = case.stream and case.kind in ("text", "text_to_speech", "speech_to_speech")
        if fault.keeps and said and not self._reading.delivered:
            problems.append("nothing is heard of what the vendor said before it stopped")


def _foreign(error: Exception, problems: list[str]) -> str:
    problems.append(f"{type(error).__name__} comes out of it, and only PomeloError may: {error}")
    return type(error).__name__
