"""File descriptors: how many this process may have open, which bounds its connections."""

from __future__ import annotations

from contextlib import suppress

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

_MOST = 1 << 20


def limit() -> int:
    """How many descriptors this process may have open; a million where nothing limits them."""
    if resource is None:
        return _MOST
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> int:
    """Raises the limit as far as the system lets this process, up to a million, and returns it.

    The limit applies to the whole process and its children: call this at the start of a program.
    """
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
        if wanted > limit():
            with suppress(ValueError, OSError):  # macOS allows less than it reports
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return limit()
