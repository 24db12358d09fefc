"""An error is added as a value of ErrorReason and a row in the table of errors."""

from __future__ import annotations

from pathlib import Path

from tests.extensions.checkout import Checkout


def test_an_added_error_is_reported_over_every_protocol(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    checkout.add_files("error")
    checkout.add_after(
        "proto/pomelo/v1/error_reason.proto",
        "ERROR_REASON_MODEL_NOT_FOUND = 28;",
        "  // Nothing runs on a public holiday. UNAVAILABLE, HTTP 503, with RetryInfo.\n"
        "  // Example: a task on the first of January.\n"
        "  ERROR_REASON_PUBLIC_HOLIDAY = 29;",
    )
    checkout.add_after(
        "pomelo/errors.py",
        "_ROWS = (",
        '    ErrorRow("public_holiday", 503, "UNAVAILABLE", "api_error",\n'
        '             "Closed on a public holiday. Come back tomorrow", 3600),',
    )
    checkout.generate()
    checkout.pytest("tests/check_error.py", "tests/unit/test_status.py")
    assert checkout.additions() == {"pomelo/errors.py": 2, "proto/pomelo/v1/error_reason.proto": 3}
