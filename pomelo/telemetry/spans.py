"""OpenTelemetry traces: a span for each task, and one within it for each call to a vendor.

The names are those of OpenTelemetry's conventions for generative AI. The spans are made when the task has
ended, from its reports, so a task that runs costs nothing. No span has content of a caller or a vendor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pomelo import __version__
from pomelo.call import MODE_NAMES
from pomelo.stores.usage import UsageRecord
from pomelo.telemetry.events import AttemptReport, Observer, TaskReport

MAX_FAILED = 10_000
"""Maximum number of running tasks whose failed calls are kept."""

FLUSH_TIMEOUT = 2.0
"""Seconds that the last spans have to be sent when the server shuts down."""

_OPERATIONS = {"text": "chat"}
"""Names of operations by task type; all others are `generate_content`."""

_OUTPUTS = {"text": "text", "image": "image", "text_to_speech": "speech", "speech_to_speech": "speech"}
"""The type of the output by task type; a transcription is text."""

_PROVIDERS = {"mistral": "mistral_ai"}
"""Names of the conventions that differ from Pomelo's."""

_TRACE_CONTEXT = TraceContextTextMapPropagator()


@asynccontextmanager
async def open_spans(
    exporter: SpanExporter | None = None, worker: int | None = None
) -> AsyncIterator[Observer]:
    """Yields an observer that sends spans to the collector that the standard variables name, or to
    `exporter`. Sampling follows the caller's `traceparent` and OTEL_TRACES_SAMPLER. Leaving sends the last
    spans.

    Raises:
        ValueError: a variable has a wrong value.
    """
    resource = Resource.create(
        {
            "service.name": os.environ.get("OTEL_SERVICE_NAME", "pomelo"),
            "service.version": __version__,
            "service.instance.id": f"{socket.gethostname()}.{worker or 0}",
        }
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter or _open_exporter()))
    try:
        yield Spans(provider.get_tracer("pomelo", __version__))
    finally:
        # It waits for a collector that may be gone, so not in the event loop, and not for long.
        sending = threading.Thread(target=provider.shutdown, daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, FLUSH_TIMEOUT)


def _open_exporter() -> SpanExporter:
    """Returns the exporter to the collector of the variables.

    Raises:
        ValueError: a header in them is malformed. OpenTelemetry would leave it out and log its value, which
            may be a secret.
    """
    log = logging.getLogger("opentelemetry.util.re")
    malformed: list[logging.LogRecord] = []

    def drop(record: logging.LogRecord) -> bool:
        malformed.append(record)
        return False

    level = log.level
    log.setLevel(logging.WARNING)
    log.addFilter(drop)
    try:
        exporter = OTLPSpanExporter()
    finally:
        log.removeFilter(drop)
        log.setLevel(level)
    if malformed:
        raise ValueError("the headers in OTEL_EXPORTER_OTLP_HEADERS must be NAME=VALUE, separated by commas")
    return exporter


class Spans(Observer):
    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._failed: dict[str, list[tuple[AttemptReport, int]]] = {}
        """The failed calls of running tasks and when they ended, by task id."""

    def attempt_failed(self, report: AttemptReport) -> None:
        if len(self._failed) < MAX_FAILED:
            self._failed.setdefault(report.task_id, []).append((report, time.time_ns()))

    def task_ended(self, report: TaskReport) -> None:
        ended = time.time_ns()
        failed = self._failed.pop(report.task_id, [])
        begins = [at - _ns(attempt.elapsed_ms) for attempt, at in failed]
        # On a busy machine the report comes late, but no call begins before its task.
        begin = min([ended - _ns(report.elapsed_ms), *begins])
        header = report.call.traceparent
        parent = _TRACE_CONTEXT.extract({"traceparent": header}) if header else None
        span = self._tracer.start_span(
            f"{report.task_type} {report.model}" if report.task_type else "task",
            parent,
            SpanKind.SERVER,
            _task_attributes(report),
            start_time=begin,
        )
        if span.is_recording():
            context = set_span_in_context(span)
            for (attempt, at), start in zip(failed, begins, strict=True):
                self._add_call(context, report, attempt, start, at)
            if report.attempts > len(failed):  # the last call did not fail
                last = report.upstream_ms - sum(attempt.elapsed_ms for attempt, _ in failed)
                self._add_call(context, report, None, ended - _ns(max(0.0, last)), ended)
        if report.code:
            span.set_status(Status(StatusCode.ERROR, report.reason or None))
        span.end(ended)

    def _add_call(
        self, context: Any, task: TaskReport, failure: AttemptReport | None, start: int, end: int
    ) -> None:
        """Adds the span of a call to a vendor; `failure` says why it failed."""
        call = failure or task
        span = self._tracer.start_span(
            f"{_operation(task)} {call.provider_model}",
            context,
            SpanKind.CLIENT,
            _call_attributes(task, call),
            start_time=start,
        )
        if failure is not None:
            span.set_attribute("error.type", failure.code)
            span.set_status(Status(StatusCode.ERROR, failure.reason or None))
        elif task.record is not None:
            span.set_attributes(_token_attributes(task.record))
        span.end(end)


def _operation(task: TaskReport) -> str:
    return _OPERATIONS.get(task.task_type, "generate_content")


def _task_attributes(task: TaskReport) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": _operation(task),
        "gen_ai.request.model": task.model,
        "gen_ai.request.stream": task.stream,
        "pomelo.request_id": task.call.request_id,
        "pomelo.task_id": task.task_id,
        "pomelo.account": task.account,
        "pomelo.key_id": task.key_id,
        "pomelo.mode": MODE_NAMES[task.live],
        "pomelo.protocol": task.call.protocol,
        "pomelo.outcome": task.outcome,
        "pomelo.attempts": task.attempts,
        "pomelo.replayed": task.replayed,
    }
    if task.http_status:
        attributes["http.response.status_code"] = task.http_status
    if task.code:
        attributes["error.type"] = task.code
    if task.record is not None:
        attributes["pomelo.cost_micros"] = task.record.cost
    return attributes


def _call_attributes(task: TaskReport, call: TaskReport | AttemptReport) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": _operation(task),
        "gen_ai.provider.name": _PROVIDERS.get(call.provider, call.provider),
        "gen_ai.request.model": call.provider_model,
        "gen_ai.request.stream": task.stream,
        "gen_ai.output.type": _OUTPUTS.get(task.task_type, "text"),
        "pomelo.route": call.route,
    }
    if call.upstream_status:
        attributes["http.response.status_code"] = call.upstream_status
    if call.vendor_request_id:
        attributes["pomelo.vendor_request_id"] = call.vendor_request_id
    if call.vendor_code:
        attributes["pomelo.vendor_code"] = call.vendor_code
    return attributes


def _token_attributes(record: UsageRecord) -> dict[str, int]:
    counts = {
        "gen_ai.usage.input_tokens": record.input_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_input_tokens,
        "gen_ai.usage.cache_creation.input_tokens": record.cache_write_input_tokens,
        "gen_ai.usage.reasoning.output_tokens": record.reasoning_tokens,
    }
    return {name: count for name, count in counts.items() if count}


def _ns(milliseconds: float) -> int:
    return round(milliseconds * 1_000_000)
