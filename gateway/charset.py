"""The charset that a Content-Type names."""

from __future__ import annotations

import re

UTF_8 = frozenset({"", "utf-8", "utf8"})
"""Names of UTF-8 in lower case, and none at all: JSON and forms are UTF-8 (RFC 8259, RFC 7578)."""

_CHARSET = re.compile(r""";\s*charset\s*=\s*["']?([^\s;"']*)""", re.IGNORECASE)


def charset_of(content_type: str) -> str:
    """The charset in lower case, the first if there are several; empty if there is none."""
    match = _CHARSET.search(content_type)
    return match[1].lower() if match is not None else ""
