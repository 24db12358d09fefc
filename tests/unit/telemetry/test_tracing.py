"""Spans as a collector receives them, over OTLP."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from pomelo.telemetry.events import Observer, TaskReport
from pomelo.telemetry.spans import FLUSH_TIMEOUT, open_spans
from pomelo.telemetry.tracing import is_configured, open_tracing
from pomelo.testing import Answer, error_reply
from tests.tasks import text_body
from tests.unit.engine.apps import open_engine
from tests.web_server import serve_application

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
BUSY = error_reply(503, code="busy", headers={"x-request-id": "req_vendor"})
CANARY = "a prompt that nobody may see"


@dataclass
class Collector:
    """An OTLP collector, and the bodies that it received."""

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)

    async def receive(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.read())
        return web.Response(content_type="application/x-protobuf")

    def spans(self, kind: Span.SpanKind.ValueType) -> list[Span]:
        """The spans of that kind in the order of their start."""
        spans = [
            span
            for body in self.bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
            if span.kind == kind
        ]
        return sorted(spans, key=lambda span: span.start_time_unix_nano)

    @property
    def task(self) -> Span:
        """The one span of a task."""
        (span,) = self.spans(Span.SPAN_KIND_SERVER)
        return span


@pytest.fixture(name="collector")
async def _collector() -> AsyncIterator[Collector]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.receive)
    async with serve_application(app) as url:
        collector.url = f"{url}/v1/traces"
        yield collector


async def ask(
    collector: Collector,
    folder: Path,
    *before: Observer,
    stream: bool = False,
    headers: dict[str, str] | None = None,
    **body: Any,
) -> None:
    """Asks one task of a vendor that is busy at first, and sends its spans. The observers `before` get its
    reports first."""
    async with (
        open_spans(OTLPSpanExporter(collector.url)) as spans,
        open_engine(folder, observers=[*before, spans]) as engine,
    ):
        account = await engine.account()
        engine.upstream.script(BUSY, Answer("Hello"))
        await engine.ask(account, text_body(**body), stream=stream, headers=headers)


def attributes(span: Span) -> dict[str, Any]:
    """The attributes of a span by name."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value") or "") for one in span.attributes}


async def test_spans_name_the_process_that_sends_them(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", collector.url)
    async with (
        open_tracing(worker=3) as observers,
        open_engine(tmp_path, observers=observers) as engine,
    ):
        await engine.ask(await engine.account(), text_body())
    (resource,) = ExportTraceServiceRequest.FromString(*collector.bodies).resource_spans
    named = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert named["service.name"] == "pomelo"
    assert named["service.instance.id"] == f"{socket.gethostname()}.3"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_task_has_a_span_with_one_for_each_call_to_a_vendor(
    collector: Collector, tmp_path: Path, stream: bool
) -> None:
    await ask(collector, tmp_path, stream=stream, headers={"x-request-id": "r1"})
    task = collector.task
    assert task.name == "text gpt-4"
    assert task.status.code == Status.STATUS_CODE_UNSET
    of_task = attributes(task)
    assert of_task["pomelo.request_id"] == "r1"
    assert (of_task["gen_ai.request.model"], of_task["pomelo.attempts"]) == ("gpt-4", 2)
    assert of_task["pomelo.cost_micros"] > 0
    failed, answered = collector.spans(Span.SPAN_KIND_CLIENT)
    for call in (failed, answered):
        assert (call.kind, call.parent_span_id, call.trace_id) == (
            Span.SPAN_KIND_CLIENT, task.span_id, task.trace_id,
        )  # fmt: skip
        assert attributes(call)["gen_ai.provider.name"] == "openai"
        assert task.start_time_unix_nano <= call.start_time_unix_nano <= call.end_time_unix_nano
        assert call.end_time_unix_nano <= task.end_time_unix_nano
    assert failed.end_time_unix_nano <= answered.start_time_unix_nano
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert failed.status.message == "the vendor is overloaded or down"
    assert attributes(failed)["error.type"] == "provider_unavailable"
    assert attributes(failed)["http.response.status_code"] == 503
    assert attributes(failed)["pomelo.vendor_request_id"] == "req_vendor"
    assert attributes(answered)["http.response.status_code"] == 200
    assert attributes(answered)["gen_ai.usage.output_tokens"] > 0
    assert "error.type" not in attributes(answered)


class Slow(Observer):
    """An observer that holds up those after it, as a busy machine does."""

    def task_ended(self, report: TaskReport) -> None:
        time.sleep(0.2)


async def test_no_call_begins_before_its_task_if_the_report_is_late(
    collector: Collector, tmp_path: Path
) -> None:
    await ask(collector, tmp_path, Slow())
    failed, _ = collector.spans(Span.SPAN_KIND_CLIENT)
    assert collector.task.start_time_unix_nano <= failed.start_time_unix_nano


async def test_a_span_continues_the_trace_of_its_caller(collector: Collector, tmp_path: Path) -> None:
    await ask(collector, tmp_path, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    task = collector.task
    assert (task.trace_id.hex(), task.parent_span_id.hex()) == (TRACE, PARENT)


async def test_a_caller_who_does_not_sample_gets_no_spans(collector: Collector, tmp_path: Path) -> None:
    await ask(collector, tmp_path, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert collector.bodies == []


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", "00-" + "f" * 5000])
async def test_a_malformed_traceparent_begins_a_new_trace(
    collector: Collector, tmp_path: Path, header: str
) -> None:
    await ask(collector, tmp_path, headers={"traceparent": header})
    task = collector.task
    assert (task.parent_span_id, len(task.trace_id)) == (b"", 16)


async def test_a_refused_task_has_a_span_with_its_code(collector: Collector, tmp_path: Path) -> None:
    await ask(collector, tmp_path, model="gpt-9")
    task = collector.task
    assert task.name == "task"
    assert collector.spans(Span.SPAN_KIND_CLIENT) == []
    assert task.status.code == Status.STATUS_CODE_ERROR
    assert attributes(task)["error.type"] == "unsupported_model"
    assert attributes(task)["http.response.status_code"] == 400


async def test_no_span_has_content(collector: Collector, tmp_path: Path) -> None:
    await ask(collector, tmp_path, messages=[{"role": "user", "content": CANARY}])
    assert collector.bodies
    assert CANARY.encode() not in b"".join(collector.bodies)
    assert b"Hello" not in b"".join(collector.bodies)
    assert b"pml_" not in b"".join(collector.bodies)


async def test_a_collector_that_never_answers_delays_neither_a_task_nor_the_shutdown(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        exporter = OTLPSpanExporter(f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces")
        async with (
            asyncio.timeout(FLUSH_TIMEOUT + 5),
            open_spans(exporter) as spans,
            open_engine(tmp_path, observers=[spans]) as engine,
        ):
            account = await engine.account()
            engine.upstream.default = Answer("Hello")
            assert (await engine.ask(account, text_body())).code == "ok"


@pytest.mark.parametrize(
    ("environ", "configured"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "True"}, False),
    ],
)
def test_tracing_is_configured_by_the_standard_variables(environ: dict[str, str], configured: bool) -> None:
    assert is_configured(environ) is configured


async def test_a_malformed_header_for_the_collector_is_refused_and_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("opentelemetry.util.re")
    monkeypatch.setattr(log, "level", logging.ERROR)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "a secret without a name")
    with pytest.raises(ValueError, match="NAME=VALUE"):
        async with open_spans():
            pytest.fail("the header was left out")
    assert "secret" not in caplog.text
    assert (log.level, log.filters) == (logging.ERROR, [])
