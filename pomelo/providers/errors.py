"""The errors that a provider raises, and what the router may do about them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Final, Self

from pomelo.errors import PomeloError

CODES = frozenset(
    (
        "provider_unavailable",
        "provider_failed",
        "content_policy_violation",
        "context_length_exceeded",
        "invalid_parameter",
        "payload_too_large",
        "deadline_exceeded",
    )
)
"""The codes that a provider may raise. A task whose provider raises another code fails with
provider_failed."""


MAX_REASON = 200
"""Characters of a reason; more are cut off."""

TOKEN = re.compile(r"[A-Za-z0-9._:-]{1,64}")
"""What a vendor's code or id may be."""


def safe_token(text: str) -> str:
    """Return a vendor's code or id if it can't be anything else, otherwise ""."""
    return text if TOKEN.fullmatch(text) else ""


class RetryPolicy(Enum):
    """What the router may do about a failure before the first event, without doing the work twice."""

    NEVER = "never"
    """Return the error: the request itself is at fault, or the vendor may have done the work."""
    NEXT_ROUTE = "next route"
    """Try the next route: the vendor did no work, and would answer a second request in the same way."""
    SAME_ROUTE = "same route"
    """Wait and send the request again: the vendor did no work."""


class UpstreamError(PomeloError):
    """A failed call to a vendor.

    `retry` is what the router may do. `wait` is the vendor's Retry-After in whole seconds, or None.

    The rest is for operators: only tracebacks show `note`; the log has the `reason` (`note` if it is empty),
    which is not in the vendor's words, and `vendor_code`, the vendor's own code of the error.
    """

    def __init__(
        self,
        code: str,
        message: str = "",
        *,
        field: str | None = None,
        retry: RetryPolicy = RetryPolicy.NEVER,
        wait: int | None = None,
        note: str = "",
        reason: str = "",
        vendor_code: str = "",
    ) -> None:
        super().__init__(code, message, field=field, retry_after=wait)
        self.retry: Final = retry
        self.wait: Final = wait
        self.note: Final = note
        self.reason: Final = (reason or note)[:MAX_REASON]
        self.vendor_code: Final = safe_token(vendor_code)
        if note:
            self.add_note(note)

    def copy(self, retry: RetryPolicy | None = None) -> Self:
        """Return a new error with the same content, and with another retry policy if one is given."""
        return type(self)(
            self.code,
            self.message,
            field=self.field,
            retry=self.retry if retry is None else retry,
            wait=self.wait,
            note=self.note,
            reason=self.reason,
            vendor_code=self.vendor_code,
        )


@contextmanager
def never_retried() -> Iterator[None]:
    """Turn off retries for what fails inside: the vendor has accepted the task, and may charge for it.

    Raises:
        UpstreamError: the failure, with RetryPolicy.NEVER.
    """
    try:
        yield
    except UpstreamError as error:
        raise error.copy(RetryPolicy.NEVER) from error
