"""The one suite: every built-in provider passes it, a good one of somebody else's too, and bad ones don't."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from pomelo.providers import BUILTIN, SANDBOX
from pomelo.providers.base import Event, Job
from pomelo.testing import FaultUpstream, Wire, Wording
from pomelo.testing.faults import FAULTS, WORDED, left_out
from pomelo.testing.suite import Case, Subject, cases, run
from pomelo.testing.upstream import WIRES
from tests.providers import acme
from tests.providers.subjects import SUBJECTS

CASES = [case for subject in SUBJECTS for case in cases(subject)]


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_a_provider_keeps_its_contract(case: Case) -> None:
    (await run(case)).check()


def test_every_built_in_provider_is_examined() -> None:
    vendors = {job.route.provider for subject in SUBJECTS for job in subject.jobs}
    assert vendors >= BUILTIN.keys() - {SANDBOX}
    assert {subject.wire.name for subject in SUBJECTS} == {wire.name for wire in WIRES}


def test_there_are_enough_faults_and_no_two_of_one_name() -> None:
    assert len(FAULTS) >= 30
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({str(case) for case in CASES}) == len(CASES)


def test_a_built_in_wire_has_words_for_every_fault_or_says_why_not() -> None:
    for wire in WIRES:
        for kind, wording in wire.wordings.items():
            assert not wording.said.keys() & wording.lacks.keys()
            assert wording.said.keys() | wording.lacks.keys() <= WORDED
            for what, why in left_out(wire, kind).items():
                assert "has no words" not in why, (wire.name, kind, what)


def test_a_word_for_a_fault_that_nobody_knows_is_refused() -> None:
    odd = Wire(
        "odd", lambda _: True, lambda *_: None, acme.answer, wordings={"text": Wording(lacks={"x": "y"})}
    )
    with pytest.raises(ValueError, match="odd, text: no fault is called x"):
        cases(Subject("odd", acme.Acme, lambda upstream: upstream.url, odd, ()))


@pytest.mark.parametrize("case", cases(acme.subject(acme.Acme)), ids=str)
async def test_a_good_provider_of_someone_elses_passes(case: Case) -> None:
    (await run(case)).check()


BAD = {
    acme.SwallowsCuts: "it ends in ok, and should end in provider_failed",
    acme.ForgetsTheEndMarker: "it ends in ok, and should end in provider_failed",
    acme.LeaksAConnection: "a connection to the vendor was not closed",
    acme.ShowsTheKey: "the error shows 'key-canary",
    acme.ShowsThePromptInTheContext: "the error shows 'my canary prompt'",
    acme.RaisesAnything: "comes out of it, and only PomeloError may",
    acme.LeavesATask: "asyncio tasks are left: sleep",
    acme.WaitsAgain: "it ends after",
    acme.AnswersInPieces: "a whole answer is more than one event",
    acme.GoesOn: "an event comes after the last one",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
async def test_a_bad_provider_is_found(make: type[acme.Acme]) -> None:
    for case in cases(acme.subject(make)):
        verdict = await run(case)
        if any(BAD[make] in problem for problem in verdict.problems):
            with pytest.raises(AssertionError, match=make.__name__):
                verdict.check()
            return
    raise AssertionError("nothing was found")


class TellsCosts(acme.Acme):
    """Reports what its vendor says that the answer cost."""

    cost: Any = 0.0007

    async def text(self, job: Job) -> AsyncGenerator[Event, None]:
        job.report.cost = self.cost
        async with aclosing(super().text(job)) as events:
            async for event in events:
                yield event


class TellsText(TellsCosts):
    """Reports a cost that is no number."""

    cost = "0.0007"


class TellsCents(TellsCosts):
    """Reports cents as dollars."""

    cost = 0.07


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (TellsCosts, ""),
        (acme.Acme, "the cost that it reports is none: NoneType is no number"),
        (TellsText, "the cost that it reports is none: str is no number"),
        (TellsCents, "it reports a cost of 0.07 US dollars, and should report 0.0007"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_cost_that_has_to_be_reported_is_examined(
    make: type[acme.Acme], problem: str, stream: bool
) -> None:
    subject = replace(acme.subject(make), cost=Decimal("0.0007"))
    verdict = await run(Case(subject, subject.jobs[0], stream))
    assert verdict.problems[:1] == ((problem,) if problem else ())  # the next task has it, too


async def test_the_case_that_finds_a_forgotten_end_marker_is_the_one_for_it() -> None:
    (case,) = [
        case
        for case in cases(acme.subject(acme.ForgetsTheEndMarker))
        if case.stream and case.fault is not None and case.fault.name == "no end marker"
    ]
    verdict = await run(case)
    assert (verdict.code, verdict.delivered) == ("ok", len("".join(acme.WORDS)))
    assert verdict.problems


async def test_a_further_wire_is_played_beside_the_built_in_ones() -> None:
    async with FaultUpstream(wires=(acme.WIRE,)) as upstream:
        assert upstream.connections == upstream.serving == 0
        await upstream.idle()
