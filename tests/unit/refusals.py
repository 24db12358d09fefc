"""Expected errors."""

from __future__ import annotations

import pytest

from pomelo.errors import PomeloError


def refused(code: str, field: str | None = None, match: str | None = None) -> pytest.RaisesExc[PomeloError]:
    """Expects an error with this code, with this field if one is given, and with a message that matches."""
    return pytest.raises(
        PomeloError,
        match=match,
        check=lambda error: error.code == code and field in (None, error.field),
    )
