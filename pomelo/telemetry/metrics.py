"""The metrics of one process: what is counted and measured, and how the end of a task changes it.

Labels only have values of the catalogue and of fixed sets. What a caller sends is never one, nor is an
account or a key.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Iterable

from pomelo import __version__
from pomelo.call import MODE_NAMES
from pomelo.money import MICROS
from pomelo.runtime.in_flight import InFlight
from pomelo.stores.usage import UsageRecord
from pomelo.telemetry.events import AttemptReport, CallReport, Observer, TaskReport
from pomelo.telemetry.instruments import Counter, Gauge, Histogram, Instrument, ReadCounter

TASK_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
STORE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
LAG_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""The upper bounds of buckets."""


class Metrics(Observer):
    """The instruments of one process. It observes tasks; the other values are read by `Gauge` sources, or
    written by what they measure. Some need a `refresh` before they are read."""

    def __init__(self) -> None:
        self._models: Container[str] = ()
        self._refreshes: list[Callable[[], Awaitable[None]]] = []

        tasks = ("type", "model", "provider")
        self.tasks = Counter(
            "pomelo_tasks_total",
            "Tasks that have ended; the code is ok, cancelled (the caller left) or that of the error.",
            *("protocol", "mode", *tasks, "code"),
        )
        self.calls = Counter(
            "pomelo_calls_total",
            "Other calls that have ended, and those that were refused before their task was known.",
            *("protocol", "code"),
        )
        self.duration = Histogram(
            "pomelo_task_duration_seconds",
            "Time from the key check to the end of a task that called a provider.",
            *tasks,
            bounds=TASK_SECONDS,
        )
        self.first_byte = Histogram(
            "pomelo_task_first_byte_seconds",
            "Time from the reservation to the first byte of output.",
            *tasks,
            bounds=TASK_SECONDS,
        )
        self.upstream = Histogram(
            "pomelo_task_upstream_seconds",
            "Time of a task's calls to providers.",
            *tasks,
            bounds=TASK_SECONDS,
        )
        self.tasks_in_flight = Gauge("pomelo_tasks_in_flight", "Tasks that run now.")
        self.calls_in_flight = Gauge(
            "pomelo_calls_in_flight",
            "Calls of both protocols from the check of their key to their end, also while a body is read.",
        )
        self.calls_limit = Gauge("pomelo_calls_limit", "POMELO_MAX_CALLS.")
        self.failed_attempts = Counter(
            "pomelo_attempts_failed_total",
            "Calls to providers that failed; the status is the class of the provider's HTTP status, or none.",
            *("provider", "code", "upstream_status"),
        )
        self.circuits = Gauge(
            "pomelo_circuit_state",
            "The circuit breaker of a provider's model: 0 closed, 1 half-open, 2 open.",
            *("provider", "provider_model"),
        )
        self.input_tokens = Counter(
            "pomelo_input_tokens_total", "Input tokens of charged tasks.", "model", "mode"
        )
        self.output_tokens = Counter(
            "pomelo_output_tokens_total", "Output tokens of charged tasks.", "model", "mode"
        )
        self.cost = Counter(
            "pomelo_cost_credits_total", "Credits that were charged.", "model", "mode", units=MICROS
        )
        self.uncollected = Counter(
            "pomelo_uncollected_credits_total",
            "Credits that tasks cost beyond what was reserved and available.",
            units=MICROS,
        )
        self.held = Gauge(
            "pomelo_held_credits",
            "Credits that the store has reserved for tasks; absent while it can't be read.",
            "mode",
        )
        self.reservation_age = Gauge(
            "pomelo_oldest_reservation_age_seconds",
            "Time since the last sign of life of the task of the oldest reservation, 0 without one; absent "
            "while the store can't be read.",
        )
        self.store_operations = Histogram(
            "pomelo_store_operation_seconds",
            "Time of the operations that tasks wait for.",
            "operation",
            bounds=STORE_SECONDS,
        )
        self.store_errors = Counter(
            "pomelo_store_errors_total",
            "Operations on the store that failed; `check`: the check of each second; `archive`: moving usage "
            "records to the archive.",
            "operation",
        )
        self.store_errors.start("check")
        self.store_errors.start("archive")
        self.ready = Gauge(
            "pomelo_ready", "1 if health checks say that the process accepts calls, otherwise 0."
        )
        self.draining = Gauge("pomelo_draining", "1 while the process drains before it ends, otherwise 0.")
        self.loop_lag = Histogram(
            "pomelo_event_loop_lag_seconds", "Delay of a timer of the event loop.", bounds=LAG_SECONDS
        )
        self.connections = Gauge("pomelo_connections", "Open connections of callers.", "protocol")
        self.connections_limit = Gauge(
            "pomelo_connections_limit", "Connections of callers that the process accepts.", "protocol"
        )
        self.upstream_connections = Gauge(
            "pomelo_upstream_connections", "Connections to providers that serve a call."
        )
        self.upstream_waiting = Gauge(
            "pomelo_upstream_calls_waiting", "Calls that wait for a connection to a provider."
        )
        self.media_bytes = Gauge("pomelo_media_stored_bytes", "Bytes of stored media.")
        self.media_limit = Gauge("pomelo_media_limit_bytes", "POMELO_MEDIA_LIMIT.")
        self.certificate_end = Gauge(
            "pomelo_certificate_end_timestamp_seconds",
            "When the certificate that callers get ends, as Unix time; absent without TLS.",
        )
        self.log_lines_dropped = ReadCounter(
            "pomelo_log_lines_dropped_total",
            "Log lines that were dropped: one message repeated too often, or could not be written.",
        )
        self.build = Gauge("pomelo_build_info", "Always 1; the version of Pomelo.", "version")
        self.build.read_one(lambda: 1, __version__)

    @property
    def instruments(self) -> list[Instrument]:
        """All instruments, in the order in which they are reported."""
        return [value for value in vars(self).values() if isinstance(value, Instrument)]

    def know_models(self, models: Container[str]) -> None:
        """Sets the names that the label `model` may have; for others it is empty."""
        self._models = models

    def know_providers(self, providers: Iterable[str]) -> None:
        """Reports 0 for the failures of these providers that are alerted."""
        for provider in providers:
            self.failed_attempts.start(provider, "provider_failed", "4xx")

    def watch_connections(self, protocol: str, count: Callable[[], int], limit: int) -> None:
        """Adds the connections of a protocol, which `count` returns, and their limit."""
        self.connections.read_one(count, protocol)
        self.connections_limit.read_one(lambda: limit, protocol)

    def watch_calls(self, in_flight: InFlight) -> None:
        """Adds the calls in flight that count toward the limit of the process, and the limit."""
        self.calls_in_flight.read_one(lambda: in_flight.calls)
        self.calls_limit.read_one(lambda: in_flight.limits.calls)

    async def check_store(self, check: Callable[[], Awaitable[object]]) -> None:
        """Runs the check of the store, and counts its failure: in an outage, calls fail before any other
        operation that is counted."""
        try:
            await check()
        except Exception:
            self.store_errors.values["check",] += 1
            raise

    def archive_failed(self) -> None:
        """Counts that usage records could not be moved to the archive."""
        self.store_errors.values["archive",] += 1

    def watch_certificate(self, end: Callable[[], float | None]) -> None:
        """Adds the end of the certificate, as Unix time; None: not known."""
        self.certificate_end.read(lambda: {} if (at := end()) is None else {(): at})

    def before_reading(self, refresh: Callable[[], Awaitable[None]]) -> None:
        """Adds what must run before values are read. It must be bounded in time, and not raise."""
        self._refreshes.append(refresh)

    async def refresh(self) -> None:
        """Prepares the values for reading."""
        for refresh in self._refreshes:
            await refresh()

    # --- Observer

    def task_ended(self, report: TaskReport) -> None:
        model = report.model if report.model in self._models else ""
        mode = MODE_NAMES[report.live]
        kind, provider = report.task_type, report.provider
        code = report.code or ("ok" if report.outcome == "completed" else report.outcome)
        self.tasks.values[report.call.protocol, mode, kind, model, provider, code] += 1
        if report.attempts:
            self.duration.observe(report.elapsed_ms / 1000, kind, model, provider)
            if report.upstream_ms:
                self.upstream.observe(report.upstream_ms / 1000, kind, model, provider)
            if report.first_byte_ms:
                self.first_byte.observe(report.first_byte_ms / 1000, kind, model, provider)

    def attempt_failed(self, report: AttemptReport) -> None:
        status = f"{report.upstream_status // 100}xx" if report.upstream_status else "none"
        self.failed_attempts.values[report.provider, report.code, status] += 1

    def call_ended(self, report: CallReport) -> None:
        self.calls.values[report.call.protocol, report.code or "ok"] += 1

    def charged(self, record: UsageRecord) -> None:
        labels = record.model, MODE_NAMES[record.live]
        self.input_tokens.values[labels] += record.input_tokens
        self.output_tokens.values[labels] += record.output_tokens
        self.cost.values[labels] += record.cost
        if record.uncollected:
            self.uncollected.values[()] += record.uncollected
