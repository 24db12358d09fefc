"""Access: authenticates a call before its body or message is read, and limits calls in flight by account.

Both front ends admit every call here first. A call without a good key is refused from its headers alone. A
known account is limited in calls and in buffered bytes, so that no single account can exhaust the server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pomelo.call import Call, Principal
from pomelo.catalog import retirement
from pomelo.catalog.catalog import Catalog
from pomelo.engine.reservation import Ledger
from pomelo.errors import BODY_ERRORS, PomeloError
from pomelo.in_flight import InFlight, InFlightLimits, Ticket

LARGE_BODY = 64 * 1024
"""Bytes above which a refused body counts as a request, because parsing it is most of the work."""

_COUNTED = frozenset({"invalid_body", "payload_too_large"})


class Visit:
    """An admitted call. Close it when the call ends. Implements `pomelo.service.Visit`."""

    __slots__ = ("_access", "_call", "_principal", "_ticket", "close", "reserve")

    def __init__(self, access: Access, call: Call, principal: Principal, ticket: Ticket) -> None:
        self._access = access
        self._call = call
        self._principal = principal
        self._ticket = ticket
        self.reserve = ticket.reserve
        self.close = ticket.close

    async def refuse(self, error: PomeloError, model: str = "") -> PomeloError:
        """See the port."""
        counted = error.code in _COUNTED or (self._ticket.size > LARGE_BODY and error.row.http in (400, 413))
        try:
            await self._access.refused(self._call, self._principal, error, model, counted=counted)
        except PomeloError as refusal:
            return refusal
        return error

    async def refuse_task(self, error: PomeloError) -> PomeloError:
        """See the port."""
        begun = "X-Credits-Charged" in self._call.response_headers  # it was admitted, and counted then
        if begun or self._ticket.size <= LARGE_BODY or error.row.http != 400:
            return error
        return await self.refuse(error)


class Access:
    """Admits calls in this process.

    `authenticate` returns the principal of a call's key; `allowed` refuses a model that the key may not use.
    """

    def __init__(
        self,
        authenticate: Callable[[Call], Awaitable[Principal]],
        admission: Ledger,
        catalog: Catalog,
        allowed: Callable[[str, Principal], object],
        limits: InFlightLimits | None = None,
    ) -> None:
        self.in_flight = InFlight(limits)
        self._authenticate = authenticate
        self._admission = admission
        self._catalog = catalog
        self._allowed = allowed

    async def admit(self, call: Call) -> Visit:
        """See the port."""
        principal = call.principal
        if principal is None:
            principal = call.principal = await self._authenticate(call)
        try:
            ticket = self.in_flight.enter(principal.account, self._admission.concurrent(principal))
        except PomeloError:
            await self._admission.tell(call, principal)
            raise
        return Visit(self, call, principal, ticket)

    async def refused(
        self, call: Call, principal: Principal, error: PomeloError, model: str, *, counted: bool
    ) -> None:
        """Writes the limits into the answer to a call whose body is refused, and counts it as a request.

        Raises:
            PomeloError: an error that takes precedence over `error`: a header, the model, the minute's limit.
        """
        if counted:
            await self._admission.count_request(call, principal)
        known = self._catalog.models.get(model) if error.code not in BODY_ERRORS else None
        await self._admission.tell(call, principal, known)
        if call.header_error is not None:
            raise call.header_error
        if model and error.code not in BODY_ERRORS:
            self._allowed(model, principal)
            if known is not None:
                call.response_headers |= retirement.headers(known)
