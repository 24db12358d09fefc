"""Who may call what: keys, plans and models, calls in flight, and refused bodies."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pomelo.accounts.access import LARGE_BODY, Access
from pomelo.accounts.failed_keys import FailedKeys
from pomelo.accounts.keys import Keyring
from pomelo.accounts.plans import Plan
from pomelo.call import Call
from pomelo.catalog.catalog import Catalog
from pomelo.engine.ledger import Ledger
from pomelo.errors import PomeloError, invalid
from pomelo.runtime.in_flight import InFlightLimits
from pomelo.stores.base import Store
from tests.calls import call_of
from tests.unit.refusals import refused

PLANS: Mapping[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan("free", requests=5, concurrent=2, tokens=1_000),
        Plan("busy", requests=1_000, concurrent=20),
        Plan("images", models=frozenset({"flux-1-pro"})),
    )
}
BAD_BODY, BAD_FIELD = PomeloError("invalid_body"), invalid("prompt", "text")


@pytest.fixture
def access(store: Store, keyring: Keyring) -> Access:
    limits = InFlightLimits(calls=200, account_calls=100)
    return Access(keyring, PLANS, Catalog.load(), Ledger(store), limits)


async def call_with_key(keyring: Keyring, *models: str, account: str = "default", **headers: str) -> Call:
    _, key = await keyring.create(account, models=models)
    return call_of(key, 20.0, **headers)


async def test_a_key_and_a_plan_each_limit_the_models(store: Store, keyring: Keyring, access: Access) -> None:
    await store.add_account("acme", "images", 1.0)
    for account, models, allowed in (
        ("default", (), {"gpt-4", "flux-1-pro"}),
        ("default", ("gpt-4",), {"gpt-4"}),
        ("acme", (), {"flux-1-pro"}),
        ("acme", ("gpt-4",), set()),
    ):
        await store.set_plan("default", "free")
        principal = await access.authenticate(await call_with_key(keyring, *models, account=account))
        for model in ("gpt-4", "flux-1-pro"):
            assert access.may_use(principal, model) == (model in allowed)
            if model in allowed:
                assert access.model(model, principal).name == model
            else:
                with refused("model_not_allowed", "model"):
                    access.model(model, principal)
        with refused("unsupported_model", "model"):
            access.model("nothing", principal)


async def test_an_account_whose_plan_was_removed_may_use_nothing(
    store: Store, keyring: Keyring, access: Access
) -> None:
    await store.set_plan("default", "old")
    principal = await access.authenticate(await call_with_key(keyring))
    with refused("model_not_allowed", match="'old' does not exist any more"):
        access.may_use(principal, "gpt-4")


async def test_the_key_of_a_call_is_checked_again_only_after_a_while(
    keyring: Keyring, access: Access
) -> None:
    record, key = await keyring.create()
    call = call_of(key)
    assert call.recheck_key < call.deadline
    call.recheck_key = call.deadline
    principal = await access.authenticate(call)
    visit = await access.admit(call)
    await keyring.revoke(record.key_id)
    assert await access.authenticate(call) is call.principal is principal
    assert await visit.refuse(BAD_FIELD) is BAD_FIELD
    call.recheck_key = 0
    with refused("invalid_api_key"):
        await access.authenticate(call)
    assert (await visit.refuse(BAD_FIELD)).code == "invalid_api_key"
    with refused("invalid_api_key"):
        await access.authenticate(call_of(key))


async def test_a_call_whose_deadline_has_passed_is_refused_with_its_limits(
    keyring: Keyring, access: Access
) -> None:
    _, key = await keyring.create()
    call = Call.from_headers(
        {"x-request-timeout": "1e-9", "authorization": f"Bearer {key}"}.get, protocol="rest"
    )
    visit = await access.admit(call)
    with refused("deadline_exceeded"):
        await access.identify(call)
    assert "X-Credits-Remaining" in call.response_headers
    assert (await visit.refuse(BAD_FIELD)).code == "deadline_exceeded"
    wrong = call_of(key)
    wrong.deadline, wrong.header_error = 0, BAD_FIELD
    await access.authenticate(wrong)
    assert wrong.header_error is BAD_FIELD, "it is checked first"
    late = call_of("pml_test_wrong")
    late.deadline = late.recheck_key = 0
    with refused("invalid_api_key"):
        await access.identify(late)


async def test_a_key_that_was_revoked_meanwhile_counts_once_as_a_failed_one(store: Store) -> None:
    keyring = Keyring(store, b"s" * 32, failed_keys=FailedKeys(limit=1))
    access = Access(keyring, PLANS, Catalog.load(), Ledger(store))
    record, key = await keyring.create()
    call = call_of(key)
    call.address, call.recheck_key = "192.0.2.1", 0
    visit = await access.admit(call)
    await keyring.revoke(record.key_id)
    with refused("invalid_api_key") as error:
        await access.authenticate(call)
    assert await visit.refuse(error.value, "gpt-4") is error.value
    with refused("rate_limit_exceeded"):
        await access.authenticate(call)


async def test_the_limits_of_a_call_are_reported_and_those_of_its_text_model(
    store: Store, keyring: Keyring, access: Access
) -> None:
    await store.set_plan("default", "free")
    for model, tokens in (("", None), ("flux-1-pro", None), ("gpt-4", "1000")):
        call = await call_with_key(keyring)
        await access.identify(call, model)
        assert call.response_headers["X-RateLimit-Limit"] == "5"
        assert call.response_headers.get("X-RateLimit-Limit-Tokens") == tokens


@pytest.mark.parametrize(
    ("plan", "calls", "code"),
    [
        ("free", 64, "concurrency_limit_exceeded"),
        ("busy", 80, "concurrency_limit_exceeded"),
        ("images", 100, "overloaded"),
    ],
)
async def test_calls_in_flight_are_limited_and_their_refusal_reports_the_limits(
    store: Store, keyring: Keyring, access: Access, plan: str, calls: int, code: str
) -> None:
    await store.set_plan("default", plan)
    _, key = await keyring.create()
    visits = [await access.admit(call_of(key)) for _ in range(calls)]
    call = call_of(key)
    with refused(code):
        await access.admit(call)
    assert "X-Credits-Remaining" in call.response_headers
    visits[0].close()
    (await access.admit(call)).close()


@pytest.mark.parametrize(
    ("error", "size", "counted"),
    [
        (BAD_BODY, 0, True),
        (PomeloError("payload_too_large"), 0, True),
        (BAD_FIELD, LARGE_BODY, False),
        (BAD_FIELD, LARGE_BODY + 1, True),
        (PomeloError("unsupported_media_type"), LARGE_BODY + 1, False),
    ],
)
async def test_a_refused_body_that_was_work_to_parse_counts_as_a_request(
    store: Store, keyring: Keyring, access: Access, error: PomeloError, size: int, counted: bool
) -> None:
    await store.set_plan("default", "free")
    call = await call_with_key(keyring)
    visit = await access.admit(call)
    visit.reserve(size)
    assert await visit.refuse(error) is error
    assert call.response_headers["X-RateLimit-Remaining"] == ("4" if counted else "5")
    visit.close()
    assert access.in_flight.bytes == 0


async def test_the_limit_of_requests_precedes_a_refused_body(
    store: Store, keyring: Keyring, access: Access
) -> None:
    await store.set_plan("default", "free")
    visit = await access.admit(await call_with_key(keyring))
    assert [(await visit.refuse(BAD_BODY)).code for _ in range(6)] == [
        *["invalid_body"] * 5,
        "rate_limit_exceeded",
    ]


@pytest.mark.parametrize(
    ("error", "model", "headers", "code"),
    [
        (BAD_FIELD, "gpt-4", {"x_request_timeout": "soon"}, "invalid_parameter X-Request-Timeout"),
        (BAD_FIELD, "gpt-4", {}, "invalid_parameter prompt"),
        (BAD_FIELD, "flux-1-pro", {}, "model_not_allowed model"),
        (BAD_FIELD, "nothing", {}, "unsupported_model model"),
        (BAD_FIELD, "", {}, "invalid_parameter prompt"),
        (BAD_BODY, "nothing", {}, "invalid_body None"),
    ],
)
async def test_a_header_and_a_model_precede_a_wrong_field_and_a_body_that_was_not_read_has_no_model(
    store: Store,
    keyring: Keyring,
    access: Access,
    error: PomeloError,
    model: str,
    headers: dict[str, str],
    code: str,
) -> None:
    call = await call_with_key(keyring, "gpt-4", **headers)
    await store.set_plan("default", "free")
    found = await (await access.admit(call)).refuse(error, model)
    assert f"{found.code} {found.field}" == code


@pytest.mark.parametrize(
    ("size", "reserved", "error", "counted"),
    [
        (LARGE_BODY, False, BAD_FIELD, False),
        (LARGE_BODY + 1, False, BAD_FIELD, True),
        (LARGE_BODY + 1, True, BAD_FIELD, False),
        (LARGE_BODY + 1, False, PomeloError("not_found"), False),
    ],
)
async def test_a_refused_task_with_a_large_body_counts_as_a_request_unless_it_was_reserved(
    store: Store,
    keyring: Keyring,
    access: Access,
    size: int,
    reserved: bool,
    error: PomeloError,
    counted: bool,
) -> None:
    await store.set_plan("default", "free")
    call = await call_with_key(keyring)
    visit = await access.admit(call)
    visit.reserve(size)
    call.reserved = reserved
    assert await visit.refuse_task(error) is error
    await access.report_limits(call, await access.authenticate(call))
    assert call.response_headers["X-RateLimit-Remaining"] == ("4" if counted else "5")


async def test_the_memory_of_a_call_counts_for_its_visit(keyring: Keyring, access: Access) -> None:
    call = await call_with_key(keyring)
    visit = await access.admit(call)
    assert call.reserve == visit.reserve
    visit.close()
