"""The contract of providers, as test cases for built-in providers and for those of other packages.

    subject = Subject("acme", Acme, lambda upstream: upstream.url + "/acme", ACME_PROTOCOL,
                      jobs=(sample("text", Route("acme", "acme-large-2")),))

    @pytest.mark.parametrize("case", cases(subject), ids=str)
    async def test_acme(case: Case) -> None:
        (await run(case)).check()

No test framework is needed. Each case has its own server, on loopback, and its own provider. Cases must not
run concurrently, because each checks the whole process for leaks: connections, asyncio tasks and files.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from contextlib import aclosing, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from pomelo.catalog.reported_cost import Report
from pomelo.errors import PomeloError
from pomelo.providers import Credentials
from pomelo.providers.base import Job, complete_method, fit_hook, fit_job, job_method, one_event
from pomelo.providers.errors import CODES
from pomelo.providers.http.client import Http, Timeouts
from pomelo.testing.addresses import UnknownHostResolver
from pomelo.testing.broken import BODY, FORBIDDEN_PATH
from pomelo.testing.cases import DISCONNECTED, Case, Subject, Verdict, cases
from pomelo.testing.event_checker import EventChecker
from pomelo.testing.faults import OK, TIMEOUT
from pomelo.testing.leaks import connections_closed, no_leaks, printed_error
from pomelo.testing.reply import Gate
from pomelo.testing.samples import AUDIO, PROMPT, sample, task_type_of
from pomelo.testing.upstream import FaultUpstream

__all__ = [
    "AUDIO",
    "CASE_ATTEMPTS",
    "CODES",
    "DEADLINE",
    "DISCONNECTED",
    "KEY",
    "LIMIT",
    "MAX_CLOSE_SECONDS",
    "PROMPT",
    "SECRETS",
    "TOLERANCE",
    "Case",
    "Subject",
    "Verdict",
    "cases",
    "run",
    "sample",
    "task_type_of",
]

KEY = "key-canary-2718"
SECRETS = (KEY, PROMPT, BODY.split()[0], "a canary sound")
"""The key, the caller's input and the vendor's body. An error must not show any of them."""

LIMIT = 0.15
"""Seconds of the timeouts of the provider's `Http`; the connect timeout only counts for addresses that do not
answer. Others answer at last, however busy the machine is."""

DEADLINE = 0.3
"""Seconds until the caller's deadline, for faults that nothing else ends."""

MAX_SECONDS = 3.0
"""Seconds for a fault that needs neither a timeout nor a deadline."""

TOLERANCE = 0.25
"""Seconds by which a timeout or deadline may be exceeded."""

MAX_CLOSE_SECONDS = 0.05
"""Seconds from a caller's disconnect to the end of its connections."""

CASE_ATTEMPTS = 3

_LEAK_SECONDS = 0.5  # what is open so long after a case is a leak
_CASE_SECONDS = 10.0  # the longest that a case may take


async def run(case: Case) -> Verdict:
    """Run a case; never raises because of the provider. A case whose only problem is its time runs up to
    CASE_ATTEMPTS times, because the machine may be busy."""
    for _ in range(CASE_ATTEMPTS):
        problems: list[str] = []
        async with (
            no_leaks(problems, within=_LEAK_SECONDS),
            FaultUpstream(protocols=(case.subject.protocol,)) as upstream,
        ):
            attempt = _Run(case, upstream, problems)
            verdict = await attempt.verdict()
            if not await connections_closed(upstream, within=_LEAK_SECONDS):
                problems.append("connections are open after the provider was closed")
        if problems or not attempt.late:
            break
    return replace(verdict, problems=(*problems, *attempt.late))


class _Run:
    """A case while it runs."""

    def __init__(self, case: Case, upstream: FaultUpstream, problems: list[str]) -> None:
        self._case = case
        self._upstream = upstream
        self._problems = problems
        needs_usage = case.subject.counts_tokens and not (case.fault is not None and case.fault.uncounted)
        self._checker = EventChecker(case.task_type, stream=case.stream, needs_usage=needs_usage)
        self._gate = Gate()
        self.late: list[str] = []
        """Problems with times, which are separate from all others."""

    async def verdict(self) -> Verdict:
        case, fault = self._case, self._case.fault
        self._upstream.default = case.script(self._gate)
        base = case.subject.base_url(self._upstream)
        unreachable = fault is not None and fault.address is not None
        address = nullcontext(base) if fault is None or fault.address is None else fault.address(base)
        silent = fault is not None and fault.address is not None and fault.stalls
        limits = Timeouts(connect=LIMIT if silent else _CASE_SECONDS, silence=LIMIT, whole=LIMIT)
        with address as url:
            async with Http(limits, resolver=UnknownHostResolver()) as http:
                provider = case.subject.make(Credentials(KEY, url), http)
                if not provider.configured:
                    self._problems.append("it is not configured, though it has a key and a base URL")
                loop = asyncio.get_running_loop()
                started = loop.time()
                code = await (self._disconnect(provider) if case.disconnects else self._read(provider))
                seconds = loop.time() - started
                self._check_outcome(code, seconds)
                await self._idle()
                if not unreachable:
                    await self._recover(provider)
                await provider.aclose()
                await provider.aclose()
        return Verdict(case, code, seconds, self._checker.events, self._checker.delivered, ())

    async def _read(self, provider: Any) -> str:
        """Read the response to its end as the engine does, and return its code."""
        case, checker, problems = self._case, self._checker, self._problems
        method, job = self._prepare(provider)
        deadline = asyncio.timeout_at(job.deadline)
        try:
            async with deadline, aclosing(method(job)) as events:
                async for event in events:
                    checker.add(event)
                    if checker.events % 2:
                        await asyncio.sleep(0)  # sometimes the reader is faster than the vendor
                await self._check_end(events)
            checker.end()
            checker.check_early_usage(job.report.usage)
            code = OK
            if case.fault is None and case.subject.cost is not None:
                checker.check_cost(job.report.cost, case.subject.cost)
        except PomeloError as error:
            code = error.code
            self._check_error(error)
        except TimeoutError as error:
            code = TIMEOUT if deadline.expired() else _unexpected(error, problems)
            checker.fail()
        except Exception as error:
            code = _unexpected(error, problems)
            checker.fail()
        problems += checker.problems
        return code

    async def _recover(self, provider: Any) -> None:
        """Check that the next task of the same provider succeeds."""
        self._upstream.default = self._case.subject.protocol.default
        for _ in range(3):
            await asyncio.sleep(0)  # turns of the event loop, for data that the vendor has sent meanwhile
        next_run = _Run(replace(self._case, fault=None, disconnects=""), self._upstream, [])
        code = await next_run._read(provider)
        if code != OK or next_run._problems:
            problems = self.late if code == TIMEOUT else self._problems
            problems.append(f"the next task ends with {code}: {'; '.join(next_run._problems)}")

    async def _disconnect(self, provider: Any) -> str:
        """Read up to the place where the caller disconnects, and disconnect."""
        method, job = self._prepare(provider)
        events = method(job)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CASE_SECONDS):
                if self._case.disconnects == "after an event":
                    self._checker.add(await anext(events))
                    since = loop.time()
                    await events.aclose()
                else:
                    since = await self._cancel_reader(events)
                await self._idle(since)
        except TimeoutError:
            self._problems.append("it never reached the place where the caller disconnects")
        except Exception as error:
            _unexpected(error, self._problems)
        finally:
            await events.aclose()
        self._problems += self._checker.problems
        return DISCONNECTED

    async def _cancel_reader(self, events: Any) -> float:
        """Cancel the reading task when the vendor has reached the gate, and return the time."""

        async def collect() -> None:
            async with aclosing(events):
                async for event in events:
                    self._checker.add(event)

        reader = asyncio.create_task(collect())
        reached = asyncio.create_task(self._gate.reached.wait())
        await asyncio.wait((reader, reached), return_when=asyncio.FIRST_COMPLETED)
        if reader.done():
            reached.cancel()
            await asyncio.wait((reached,))
            self._problems.append("it ended before the vendor's response")
            reader.exception()
            return asyncio.get_running_loop().time()
        since = asyncio.get_running_loop().time()
        reader.cancel()
        done, _ = await asyncio.wait((reader,), timeout=1)
        if not done:
            self._problems.append("it still runs a second after it was cancelled")
        elif not reader.cancelled():
            self._problems.append("it suppressed its cancellation")
            reader.exception()
        return since

    async def _idle(self, since: float | None = None) -> None:
        """Check that the vendor serves no request, because all were read or closed immediately."""
        since = asyncio.get_running_loop().time() if since is None else since
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self._upstream.idle()
        ends = [received.left_at for received in self._upstream.requests if received.left_at is not None]
        late = max((end - since for end in ends), default=0.0)
        if self._upstream.serving:
            self._problems.append("a connection to the vendor was not closed")
        elif late > MAX_CLOSE_SECONDS:
            self.late.append(f"a connection to the vendor was closed {late * 1000:.0f} ms late")

    async def _check_end(self, events: Any) -> None:
        with contextlib.suppress(StopAsyncIteration):
            await anext(events)
            self._problems.append("it yields an event after its end")

    def _prepare(self, provider: Any) -> tuple[Any, Job[Any]]:
        """The provider's method, and the job to call it with."""
        method: Any = job_method(provider, self._case.task_type)
        if method is None:
            raise LookupError(f"{self._case.subject.name} has no method {self._case.task_type}")
        complete = complete_method(provider, self._case.task_type)
        if complete is not None and not self._case.stream:
            method = partial(one_event, complete)
        fault = self._case.fault
        seconds = DEADLINE if fault is not None and fault.endless else _CASE_SECONDS
        deadline = asyncio.get_running_loop().time() + seconds
        job = fit_job(self._case.job, fit_hook(provider, self._case.task_type))
        return method, replace(job, stream=self._case.stream, deadline=deadline, report=Report())

    def _check_error(self, error: PomeloError) -> None:
        self._checker.fail()
        fault = self._case.fault
        if error.code not in CODES:
            self._problems.append(f"a provider must not raise {error.code}")
        if fault is not None and fault.wait is not None and error.retry_after != fault.wait:
            self._problems.append(f"its Retry-After is {error.retry_after}, and should be {fault.wait}")
        printed = printed_error(error)
        for secret in SECRETS:
            if secret in printed:
                self._problems.append(f"the error shows {secret!r}")

    def _check_outcome(self, code: str, seconds: float) -> None:
        case, fault, problems = self._case, self._case.fault, self._problems
        if code != case.expected:
            (self.late if code == TIMEOUT else problems).append(
                f"it ends with {code}, and should end with {case.expected}"
            )
        if any(received.path == FORBIDDEN_PATH for received in self._upstream.requests):
            problems.append("it requested a forbidden link")
        counts = Counter((r.method, r.target) for r in self._upstream.requests if r.method != "GET")
        for (_, target), count in counts.items():
            if count > 1:
                problems.append(f"{target} was requested {count} times, but only the router may retry")
        if fault is None:
            return
        limit = (LIMIT if fault.stalls else DEADLINE if fault.endless else MAX_SECONDS) + TOLERANCE
        if seconds > limit:
            self.late.append(f"it ends after {seconds:.2f} s, and should within {limit:.2f} s")
        streamed = case.stream and case.task_type in ("text", "text_to_speech", "speech_to_speech")
        if fault.keeps and streamed and not self._checker.delivered:
            problems.append("it delivers none of the output before the fault")


def _unexpected(error: Exception, problems: list[str]) -> str:
    problems.append(f"it raises {type(error).__name__}, and only PomeloError is allowed: {error}")
    return type(error).__name__
