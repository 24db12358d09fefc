"""Whether to trace: only if the standard variables of OpenTelemetry name a collector."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from pomelo import install_command
from pomelo.telemetry.events import Observer

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def is_configured(environ: Mapping[str, str]) -> bool:
    """Whether the variables name a collector for traces."""
    disabled = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not disabled and any(environ.get(name) for name in _ENDPOINTS)


@asynccontextmanager
async def open_tracing(worker: int | None = None) -> AsyncIterator[tuple[Observer, ...]]:
    """Yields the observer that sends traces, none if they are not configured. `worker` is the number of this
    process among several.

    Raises:
        ValueError: they are configured, but a package is missing or a variable has a wrong value.
    """
    if not is_configured(os.environ):
        yield ()
        return
    try:
        from pomelo.telemetry.spans import open_spans
    except ImportError:
        name = next(name for name in _ENDPOINTS if os.environ.get(name))
        raise ValueError(f"{name}: traces need another package: {install_command('otel')}") from None
    async with AsyncExitStack() as stack:
        try:
            spans = await stack.enter_async_context(open_spans(worker=worker))
        except ValueError as error:
            raise ValueError(f"The variables OTEL_… can't be used: {error}") from error
        yield (spans,)
