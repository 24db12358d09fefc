"""Who calls and what the caller may do: API keys, models, plans, and calls in flight.

Both front ends admit a call here before its body or message is read: a call without a valid key is refused
by its headers, and no account can exhaust the server with calls or buffered bytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from pomelo.accounts.keys import Keyring
from pomelo.accounts.plans import Plan
from pomelo.call import Call, Principal
from pomelo.catalog import retirement
from pomelo.catalog.catalog import Catalog, Model
from pomelo.errors import BODY_ERRORS, PomeloError, unsupported_model
from pomelo.runtime.in_flight import InFlight, InFlightLimits, Ticket

LARGE_BODY = 64 * 1024
"""Bytes above which a refused body counts as a request, because parsing it is most of the work."""

_COUNTED = frozenset({"invalid_body", "payload_too_large"})

_NO_PLAN = Plan("")
"""The limits to report of an account whose plan no longer exists."""


class LimitReporter(Protocol):
    """Reports and counts the limits of accounts for calls that run no task."""

    async def report(self, call: Call, principal: Principal, plan: Plan, model: Model | None) -> None:
        """Writes the current limits and credits into the response headers. With a text `model`, its token
        limit is included.

        Raises:
            PomeloError: store_unavailable.
        """
        ...

    async def count_request(self, call: Call, principal: Principal, plan: Plan) -> None:
        """Counts a request whose body was refused toward the requests per minute; reserves nothing.

        Raises:
            PomeloError: rate_limit_exceeded, store_unavailable.
        """
        ...


class Access:
    """Identifies callers, and says what they may do. `plans` are by name."""

    def __init__(
        self,
        keyring: Keyring,
        plans: Mapping[str, Plan],
        catalog: Catalog,
        limits: LimitReporter,
        in_flight: InFlightLimits | None = None,
    ) -> None:
        self.in_flight = InFlight(in_flight)
        self._keyring = keyring
        self._plans = plans
        self._catalog = catalog
        self._limits = limits

    def configure(self, plans: Mapping[str, Plan], catalog: Catalog) -> None:
        """Replaces the plans and the catalogue, for calls that begin from now on."""
        self._plans = plans
        self._catalog = catalog

    async def authenticate(self, call: Call) -> Principal:
        """The principal of the call's key, which may have been revoked while the call's body arrived. If the
        deadline has passed, that becomes the error of the call's headers.

        Raises:
            PomeloError: invalid_api_key, rate_limit_exceeded (the address), store_unavailable.
        """
        if call.principal is None or time.monotonic() > call.recheck_key:
            call.principal = await self._keyring.authenticate(call)
            # Otherwise a step that never waits would not notice it.
            if call.header_error is None and time.monotonic() >= call.deadline:
                call.header_error = PomeloError("deadline_exceeded")
        return call.principal

    async def identify(self, call: Call, model: str = "") -> Principal:
        """The principal of a call that reserves nothing; its limits, with those of a `model` that the call
        is about, are in the response headers.

        Raises:
            PomeloError: invalid_api_key, rate_limit_exceeded (the address), store_unavailable; after these,
                invalid_parameter (a header).
        """
        principal = await self.authenticate(call)
        await self.report_limits(call, principal, model)
        if call.header_error is not None:
            raise call.header_error
        return principal

    async def report_limits(self, call: Call, principal: Principal, model: str = "") -> None:
        """Writes the limits and credits of a call that reserves nothing into the response headers.

        Raises:
            PomeloError: store_unavailable.
        """
        plan = self._plans.get(principal.plan, _NO_PLAN)
        await self._limits.report(call, principal, plan, self._catalog.by_any_name.get(model))

    def plan(self, principal: Principal) -> Plan:
        """The account's plan.

        Raises:
            PomeloError: model_not_allowed; the plan no longer exists.
        """
        plan = self._plans.get(principal.plan)
        if plan is None:
            raise PomeloError(
                "model_not_allowed",
                f"The account's plan {principal.plan!r} does not exist any more. Ask the operator for one",
                values={"plan": principal.plan},
            )
        return plan

    def may_use(self, principal: Principal, model: str) -> bool:
        """Whether the key and the account's plan allow the model of that name.

        Raises:
            PomeloError: model_not_allowed; the plan no longer exists.
        """
        plan = self._plans.get(principal.plan) or self.plan(principal)
        return (principal.models is None or model in principal.models) and (
            plan.models is None or model in plan.models
        )

    def model(self, name: str, principal: Principal) -> Model:
        """The model of that name or alias.

        Raises:
            PomeloError: unsupported_model, model_not_allowed.
        """
        model = self._catalog.by_any_name.get(name)
        if model is None:
            raise unsupported_model(name)
        if not self.may_use(principal, model.name):
            raise PomeloError("model_not_allowed", field="model", values={"model": name})
        return model

    async def admit(self, call: Call) -> Visit:
        """Checks the key, and counts the call as in flight until the visit is closed; implements
        `pomelo.service.AccessService`."""
        principal = call.principal
        if principal is None:
            principal = call.principal = await self._keyring.authenticate(call)
        plan = self._plans.get(principal.plan)
        try:
            ticket = self.in_flight.enter(principal.account, None if plan is None else plan.concurrent)
        except PomeloError:
            await self.report_limits(call, principal)
            raise
        call.reserve = ticket.reserve
        return Visit(self, call, principal, ticket)

    async def check_refused(
        self, call: Call, principal: Principal, error: PomeloError, model: str, *, counted: bool
    ) -> None:
        """Writes the limits into the response headers of a call whose body is refused with `error`, and
        counts it as a request if `counted`.

        Raises:
            PomeloError: an error that takes precedence over `error`: the key, the minute's limit, a header,
                the model.
        """
        await self.authenticate(call)
        if counted:
            await self._limits.count_request(call, principal, self._plans.get(principal.plan, _NO_PLAN))
        if error.code in BODY_ERRORS:
            model = ""
        await self.report_limits(call, principal, model)
        if call.header_error is not None:
            raise call.header_error
        if model:
            call.response_headers |= retirement.headers(self.model(model, principal))


class Visit:
    """An admitted call; implements `pomelo.service.Visit`. Close it when the call ends."""

    __slots__ = ("_access", "_call", "_principal", "_ticket", "close", "hold", "reserve")

    def __init__(self, access: Access, call: Call, principal: Principal, ticket: Ticket) -> None:
        self._access = access
        self._call = call
        self._principal = principal
        self._ticket = ticket
        self.reserve = ticket.reserve
        self.hold = ticket.hold
        self.close = ticket.close

    def is_alone(self) -> bool:
        return self._ticket.is_alone()

    async def refuse(self, error: PomeloError, model: str = "") -> PomeloError:
        if error.code == "invalid_api_key":  # checked again, it would count as two failed keys
            return error
        counted = error.code in _COUNTED or (self._ticket.size > LARGE_BODY and error.row.http in (400, 413))
        try:
            await self._access.check_refused(self._call, self._principal, error, model, counted=counted)
        except PomeloError as refusal:
            return refusal
        return error

    async def refuse_task(self, error: PomeloError) -> PomeloError:
        # A task that was reserved was counted then.
        if self._call.reserved or self._ticket.size <= LARGE_BODY or error.row.http != 400:
            return error
        return await self.refuse(error)
