"""The one suite: every built-in provider passes it, a good one of somebody else's too, and bad ones don't."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from pomelo.providers import BUILTIN, SANDBOX
from pomelo.providers.base import Event, Job
from pomelo.testing import FaultUpstream, VendorFaults, VendorProtocol
from pomelo.testing.faults import FAULTS, VENDOR_SPECIFIC, unsupported_faults
from pomelo.testing.suite import LIMIT, Case, Subject, cases, run
from pomelo.testing.upstream import PROTOCOLS
from tests.providers import acme
from tests.providers.rig import open_provider, read_all
from tests.providers.subjects import SUBJECTS
from tests.unit.refusals import refused

CASES = [case for subject in SUBJECTS for case in cases(subject)]
(NO_TLS,) = [fault for fault in FAULTS if fault.name == "no TLS"]


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_a_built_in_provider_keeps_the_contract(case: Case) -> None:
    (await run(case)).check()


SUBJECT = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)


@SUBJECT
@pytest.mark.parametrize(
    ("key", "configured"), [(None, False), ("", False), ("  ", False), ("k", True), (" k ", True)]
)
async def test_without_a_key_it_is_not_configured(
    subject: Subject, key: str | None, configured: bool
) -> None:
    async with open_provider(subject.make, "https://api.example", key=key) as provider:
        assert provider.configured is configured


@SUBJECT
@pytest.mark.parametrize("key", ["sk\r\nX-Evil: 1", "sk\x00"])
async def test_a_key_that_is_not_a_valid_header_fails_and_is_not_shown(
    subject: Subject, upstream: FaultUpstream, key: str
) -> None:
    async with open_provider(subject.make, subject.base_url(upstream), key=key) as provider:
        for job in subject.jobs:
            with refused("provider_failed") as raised:
                await read_all(provider, job)
            assert "Evil" not in repr(raised.value)
    assert upstream.requests == []


@SUBJECT
async def test_a_base_url_may_end_with_a_slash(subject: Subject, upstream: FaultUpstream) -> None:
    paths = []
    for end in ("", "/"):
        async with open_provider(subject.make, subject.base_url(upstream) + end) as provider:
            for job in subject.jobs:
                assert await read_all(provider, job)
        paths.append([received.path for received in upstream.requests if received.method == "POST"])
        upstream.requests.clear()
    assert len(paths[0]) == len(subject.jobs)
    assert paths[0] == paths[1]
    assert "//" not in "".join(paths[0])


def test_every_built_in_provider_is_tested() -> None:
    vendors = {job.route.provider for subject in SUBJECTS for job in subject.jobs}
    assert vendors >= BUILTIN.keys() - {SANDBOX}
    protocols = {protocol.name for protocol in PROTOCOLS}
    assert {subject.protocol.name for subject in SUBJECTS} == protocols


def test_there_are_many_faults_with_unique_names() -> None:
    assert len(FAULTS) >= 30
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({str(case) for case in CASES}) == len(CASES)


def test_a_built_in_protocol_defines_every_fault_or_the_reason_why_it_is_impossible() -> None:
    for protocol in PROTOCOLS:
        for task_type, faults in protocol.faults.items():
            assert not faults.scripts.keys() & faults.unsupported.keys()
            assert faults.scripts.keys() | faults.unsupported.keys() <= VENDOR_SPECIFIC
            for fault, reason in unsupported_faults(protocol, task_type).items():
                assert "does not define it" not in reason, (protocol.name, task_type, fault)


def test_a_protocol_that_defines_an_unknown_fault_is_refused() -> None:
    odd = VendorProtocol(
        "odd",
        lambda _: True,
        lambda *_: None,
        acme.answer,
        faults={"text": VendorFaults(unsupported={"x": "y"})},
    )
    with pytest.raises(ValueError, match="odd, text: no fault is called x"):
        cases(Subject("odd", acme.Acme, lambda upstream: upstream.url, odd, ()))


@pytest.mark.parametrize("case", cases(acme.subject(acme.Acme)), ids=str)
async def test_a_correct_provider_of_another_package_passes(case: Case) -> None:
    (await run(case)).check()


BAD = {
    acme.SwallowsCuts: "it ends with ok, and should end with provider_failed",
    acme.ForgetsTheEndMarker: "it ends with ok, and should end with provider_failed",
    acme.LeaksAConnection: "a connection to the vendor was not closed",
    acme.ShowsTheKey: "the error shows 'key-canary",
    acme.ShowsThePromptInTheContext: "the error shows 'my canary prompt'",
    acme.RaisesAnything: "and only PomeloError is allowed",
    acme.LeavesATask: "asyncio tasks are left: sleep",
    acme.WaitsAgain: "it ends after",
    acme.AnswersInPieces: "a whole response has more than one event",
    acme.GoesOn: "an event was yielded after the last one",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
async def test_a_faulty_provider_fails(make: type[acme.Acme]) -> None:
    for case in cases(acme.subject(make)):
        verdict = await run(case)
        if any(BAD[make] in problem for problem in verdict.problems):
            with pytest.raises(AssertionError, match=make.__name__):
                verdict.check()
            return
    raise AssertionError("no problem was found")


class ReportsCost(acme.Acme):
    """Reports the cost that its vendor reports."""

    cost: Any = 0.0007

    def text(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        job.report.cost = self.cost
        return super().text(job)


class ReportsText(ReportsCost):
    """Reports a cost that is not a number."""

    cost = "0.0007"


class ReportsCents(ReportsCost):
    """Reports cents as dollars."""

    cost = 0.07


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (ReportsCost, ""),
        (acme.Acme, "it reports an invalid cost: NoneType is not a number"),
        (ReportsText, "it reports an invalid cost: str is not a number"),
        (ReportsCents, "it reports a cost of 0.07 US dollars, and should report 0.0007"),
    ],
)
async def test_a_cost_that_must_be_reported_is_checked(
    make: type[acme.Acme], problem: str, stream: bool
) -> None:
    subject = replace(acme.subject(make), cost=Decimal("0.0007"))
    verdict = await run(Case(subject, subject.jobs[0], stream))
    assert verdict.problems[:1] == ((problem,) if problem else ())  # the next task has it, too


async def test_a_vendor_without_tls_may_answer_slowly() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        await asyncio.sleep(2 * LIMIT)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        url = "http://{}:{}".format(*server.sockets[0].getsockname())
        subject = replace(acme.subject(acme.Acme), base_url=lambda upstream: url)
        (case,) = [case for case in cases(subject) if case.fault is NO_TLS and not case.stream]
        (await run(case)).check()


async def test_a_missing_end_marker_is_detected_by_its_case() -> None:
    (case,) = [
        case
        for case in cases(acme.subject(acme.ForgetsTheEndMarker))
        if case.stream and case.fault is not None and case.fault.name == "no end marker"
    ]
    verdict = await run(case)
    assert (verdict.code, verdict.delivered) == ("ok", len("".join(acme.WORDS)))
    assert verdict.problems


async def test_a_test_server_can_serve_an_additional_protocol() -> None:
    async with FaultUpstream(protocols=(acme.PROTOCOL,)) as upstream:
        assert upstream.connections == upstream.serving == 0
        await upstream.idle()
