"""Every field of a report is in the spans, under its own name."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from pomelo.telemetry.spans import Spans
from tests.unit.telemetry.reports import attempt, record, task

NS = 1_000_000_000
NOW = 1_700_000_000


@pytest.fixture(name="exporter")
def _exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(name="spans")
def _spans(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Spans:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(time, "time_ns", lambda: NOW * NS)
    return Spans(provider.get_tracer("test"))


def times(span: ReadableSpan) -> tuple[float, float]:
    """The seconds before NOW at which a span began and ended."""
    assert span.start_time is not None
    assert span.end_time is not None
    return NOW - span.start_time / NS, NOW - span.end_time / NS


def test_the_span_of_a_task_has_its_fields(spans: Spans, exporter: InMemorySpanExporter) -> None:
    spans.task_ended(task(attempts=0))
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.kind, span.status.status_code) == (
        "text gpt-4",
        SpanKind.SERVER,
        StatusCode.UNSET,
    )
    assert span.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "gpt-4",
        "gen_ai.request.stream": True,
        "pomelo.request_id": "req_1",
        "pomelo.task_id": "task_1",
        "pomelo.account": "acme",
        "pomelo.key_id": "key1",
        "pomelo.mode": "test",
        "pomelo.protocol": "rest",
        "pomelo.outcome": "completed",
        "pomelo.attempts": 0,
        "pomelo.replayed": True,
        "http.response.status_code": 200,
        "pomelo.cost_micros": 1_250_000,
    }
    assert times(span) == pytest.approx((2.50004, 0), abs=1e-6)


def test_a_span_has_only_what_is_known(spans: Spans, exporter: InMemorySpanExporter) -> None:
    spans.task_ended(
        task(attempts=0, http_status=0, code="cancelled", reason="", record=None, task_type="", live=True)
    )
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.status.status_code, span.status.description) == ("task", StatusCode.ERROR, None)
    attributes = span.attributes or {}
    assert (attributes["error.type"], attributes["pomelo.mode"]) == ("cancelled", "live")
    assert {"http.response.status_code", "pomelo.cost_micros"}.isdisjoint(attributes)


def test_the_spans_of_calls_have_their_fields(spans: Spans, exporter: InMemorySpanExporter) -> None:
    spans.attempt_failed(attempt())
    spans.task_ended(task(attempts=2, code="late", reason="it was late"))
    failed, answered, whole = exporter.get_finished_spans()
    common = {"gen_ai.operation.name": "chat", "gen_ai.request.stream": True, "gen_ai.output.type": "text"}
    assert (failed.name, failed.kind) == ("chat gpt-4.1", SpanKind.CLIENT)
    assert failed.attributes == common | {
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4.1",
        "pomelo.route": 1,
        "http.response.status_code": 503,
        "pomelo.vendor_request_id": "vendor_2",
        "pomelo.vendor_code": "busy",
        "error.type": "provider_failed",
    }
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "it\x1b was")
    assert times(failed) == pytest.approx((0.25006, 0), abs=1e-6)
    assert (answered.name, answered.kind, answered.status.status_code) == (
        *("chat large", SpanKind.CLIENT),
        StatusCode.UNSET,
    )
    assert answered.attributes == common | {
        "gen_ai.provider.name": "mistral_ai",
        "gen_ai.request.model": "large",
        "pomelo.route": 2,
        "http.response.status_code": 201,
        "pomelo.vendor_request_id": "vendor_1",
        "pomelo.vendor_code": "odd",
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.usage.cache_creation.input_tokens": 4,
        "gen_ai.usage.reasoning.output_tokens": 5,
    }
    assert times(answered) == pytest.approx((1.25, 0), abs=1e-6)  # of the task's 1.5 s of calls
    assert (whole.status.status_code, whole.status.description) == (StatusCode.ERROR, "it was late")
    assert whole.context is not None
    parents = [span.parent.span_id if span.parent else None for span in (failed, answered)]
    assert parents == [whole.context.span_id] * 2


@pytest.mark.parametrize(
    ("task_type", "operation", "output"),
    [
        ("image", "generate_content", "image"),
        ("text_to_speech", "generate_content", "speech"),
        ("speech_to_speech", "generate_content", "speech"),
        ("speech_to_text", "generate_content", "text"),
    ],
)
def test_the_span_of_a_call_names_its_operation(
    spans: Spans, exporter: InMemorySpanExporter, task_type: str, operation: str, output: str
) -> None:
    empty = record(
        input_tokens=0, output_tokens=9, cached_input_tokens=0, cache_write_input_tokens=0, reasoning_tokens=0
    )
    spans.task_ended(
        task(task_type=task_type, attempts=1, upstream_ms=0.0, record=empty, upstream_status=0)
        if task_type == "image"
        else task(task_type=task_type, attempts=1, record=None, vendor_code="", vendor_request_id="")
    )
    call, _ = exporter.get_finished_spans()
    attributes = dict(call.attributes or {})
    assert (attributes["gen_ai.operation.name"], attributes["gen_ai.output.type"]) == (operation, output)
    assert call.name == f"{operation} large"
    if task_type == "image":
        assert {name for name in attributes if "usage" in name} == {"gen_ai.usage.output_tokens"}
        assert "http.response.status_code" not in attributes
        assert times(call) == (0, 0)
    else:
        assert not {name for name in attributes if "usage" in name or "vendor" in name}


def test_no_call_has_a_span_beyond_the_failed_ones(spans: Spans, exporter: InMemorySpanExporter) -> None:
    for number in (1, 2):
        spans.attempt_failed(attempt(attempt=number))
    spans.attempt_failed(attempt(task_id="task_2"))
    spans.task_ended(task(attempts=2))
    assert [span.name for span in exporter.get_finished_spans()] == ["chat gpt-4.1"] * 2 + ["text gpt-4"]
    exporter.clear()
    spans.task_ended(task(attempts=2, upstream_ms=100.0))
    call, _ = exporter.get_finished_spans()  # the failed ones are forgotten
    assert times(call) == pytest.approx((0.1, 0), abs=1e-6)
    exporter.clear()
    spans.task_ended(replace(task(attempts=2, upstream_ms=100.0), task_id="task_2"))
    _, call, _ = exporter.get_finished_spans()
    assert times(call) == (0, 0)  # never longer than the task's calls


def test_the_failed_calls_of_a_task_are_kept_until_it_ends_and_bounded(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.telemetry.spans.MAX_FAILED", 3)
    for number in range(5):
        spans.attempt_failed(attempt(task_id=f"task_{number}"))
    assert set(spans._failed) == {"task_0", "task_1", "task_2"}
    for number in range(5):
        spans.task_ended(task(task_id=f"task_{number}"))
    assert not spans._failed


def test_no_call_begins_before_its_task(spans: Spans, exporter: InMemorySpanExporter) -> None:
    spans.attempt_failed(attempt())
    spans.task_ended(task(attempts=1, elapsed_ms=1.0))
    call, whole = exporter.get_finished_spans()
    assert call.start_time == whole.start_time
