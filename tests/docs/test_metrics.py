"""The documented metrics, the dashboard and the alerts name what Pomelo reports, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pomelo.accounts.budget_audit import LONGEST_TASK
from pomelo.errors import TABLE
from pomelo.network.tls import EXPIRY_NOTICE
from pomelo.telemetry.exposition import WORKER_UP, Exposition
from pomelo.telemetry.instruments import Counter, Histogram
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.store import OPERATIONS
from tests.scrapes import Scrape

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/metrics.md").read_text()
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
DASHBOARD = ROOT / "deploy/grafana/pomelo.json"

INSTRUMENTS = {instrument.name: instrument for instrument in [*Metrics().instruments, WORKER_UP]}
ADDED_BY_PROMETHEUS = {"instance", "job"}

_ROW = re.compile(r"^\| `(pomelo_\w+)` \| (\w+) \| (.+?) \| (.+) \|$", re.MULTILINE)
_SELECTOR = re.compile(r"\b((?:pomelo|process)_\w+)(?:\{([^}]*)\})?")
_GROUPING = re.compile(r"\b(?:by|without) \(([^)]*)\)")
_QUOTED = re.compile(r'"[^"]*"')


def rules() -> list[dict[str, Any]]:
    yaml: Any = import_module("yaml")
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    """Yields every query of the alerts and the dashboard."""
    yield from (rule["expr"] for rule in rules())
    yield from (target["expr"] for panel in panels() for target in panel["targets"])


@pytest.fixture(scope="module", name="scraped")
async def _scraped() -> Scrape:
    """A scrape in which every metric has a value."""
    metrics = Metrics()
    for instrument in metrics.instruments:
        values = ["x"] * len(instrument.labels)
        if isinstance(instrument, Counter):
            instrument.values[tuple(values)] += 1
        elif isinstance(instrument, Histogram):
            instrument.observe(1.0, *values)
        elif instrument.name != "pomelo_build_info":
            instrument.read_one(lambda: 1, *values)  # type: ignore[attr-defined]
    return Scrape(await Exposition(metrics).all())


def test_the_document_lists_every_metric_with_its_type_labels_and_meaning() -> None:
    documented = [
        (name, type_, tuple(re.findall(r"`(\w+)`", labels)), meaning)
        for name, type_, labels, meaning in _ROW.findall(DOCUMENT)
    ]
    assert documented == [
        (name, instrument.kind, instrument.labels, instrument.description)
        for name, instrument in INSTRUMENTS.items()
    ]


def test_the_names_follow_the_conventions(scraped: Scrape) -> None:
    for name, type_ in scraped.types.items():
        assert name.endswith("_total") is (type_ == "counter"), name
        assert not re.search(r"_(ms|millis|micros|kb|mb|minutes)(_|$)", name)
        assert type_ != "histogram" or name.endswith("_seconds")


def test_every_query_uses_metrics_and_labels_that_are_reported(scraped: Scrape) -> None:
    names = {name for name, _ in scraped.values}
    for expression in expressions():
        selectors = _SELECTOR.findall(_QUOTED.sub('""', expression))
        assert selectors or expression.startswith("up{")
        available = set(ADDED_BY_PROMETHEUS)
        for name, matchers in selectors:
            assert name in names, f"{name} in {expression}"
            labels = scraped.labels(name) | ADDED_BY_PROMETHEUS
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= labels, expression
            available |= labels
        for group in _GROUPING.findall(expression):
            assert set(re.split(r",\s*", group)) - {""} <= available, expression


def test_every_metric_is_in_the_dashboard() -> None:
    used = " ".join(target["expr"] for panel in panels() for target in panel["targets"])
    assert [name for name in INSTRUMENTS if name not in used] == []


def test_the_legends_and_summaries_use_labels_of_their_queries(scraped: Scrape) -> None:
    texts = [(rule["expr"], rule["annotations"]["summary"], r"\$labels\.(\w+)") for rule in rules()]
    texts += [
        (target["expr"], target["legendFormat"], r"\{\{(\w+)\}\}")
        for panel in panels()
        for target in panel["targets"]
    ]
    for expression, text, label in texts:
        groups = _GROUPING.findall(expression)
        if groups:
            kept = {name for group in groups for name in re.split(r",\s*", group)}
        else:
            names = [name for name, _ in _SELECTOR.findall(_QUOTED.sub('""', expression))]
            kept = ADDED_BY_PROMETHEUS.union(*[scraped.labels(name) for name in names])
        assert set(re.findall(label, text)) <= kept, (expression, text)


def test_every_alert_has_a_summary_and_a_paragraph_that_says_what_to_do() -> None:
    headings = re.findall(r"^### (Pomelo\w+)$", DOCUMENT, re.MULTILINE)
    assert headings == [rule["alert"] for rule in rules()]
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"] == f"docs/metrics.md#{rule['alert'].lower()}"


FIRING = {
    "PomeloDown": "== 0",
    "PomeloWorkerDown": "== 0",
    "PomeloNotReady": "== 0",
    "PomeloErrors": "> 0.05",
    "PomeloProviderFails": "> 0.1",
    "PomeloProviderRefuses": "> 0",
    "PomeloCircuitOpen": "> 0",
    "PomeloStoreFails": "> 0",
    "PomeloStoreSlow": "> 0.1",
    "PomeloUncollected": "> 0",
    "PomeloReservationOld": f"> {LONGEST_TASK:.0f}",
    "PomeloEventLoopSlow": "> 0.1",
    "PomeloConnectionsUsed": "> 0.8",
    "PomeloCallsUsed": "> 0.8",
    "PomeloDescriptorsUsed": "> 0.8",
    "PomeloUpstreamWaits": "> 0",
    "PomeloMediaFull": "> 0.9",
    "PomeloCertificateEnds": f"< {EXPIRY_NOTICE.total_seconds():.0f}",
    "PomeloLogLinesDropped": "> 0",
}


def test_every_alert_fires_beyond_its_threshold() -> None:
    found = {rule["alert"]: " ".join(rule["expr"].split()[-2:]) for rule in rules()}
    assert found == FIRING
    for rule in rules():
        part, _, whole = rule["expr"].partition(" / ")
        assert not re.search("limit|max_", part), "a share is a part of the limit"
        assert not whole or re.search("limit|max_|pomelo_tasks_total", whole)


def test_an_alert_that_waits_does_not_fire_for_a_single_event() -> None:
    """A rate stays above 0 for its whole window."""
    waiting = [rule for rule in rules() if rule["expr"].endswith("> 0") and "for" in rule]
    windows = [(re.findall(r"\[(\d+)m\]", rule["expr"]), int(rule["for"][:-1])) for rule in waiting]
    assert any(lengths for lengths, _ in windows)
    assert all(int(length) < wait for lengths, wait in windows for length in lengths)


def test_alerts_select_values_that_are_reported() -> None:
    """A label that no series has would never fire."""
    expressions = {rule["alert"]: rule["expr"] for rule in rules()}
    codes, total = re.findall(r'code=~"([^"]+)"', expressions["PomeloErrors"])
    # A gateway without a server has no tasks, a server that drains is no fault, and a caller sets the deadline.
    excluded = {"server_unavailable", "shutting_down", "deadline_exceeded"}
    faults = {row.code for row in TABLE.values() if row.http >= 500} - excluded
    assert {code for code in TABLE if re.fullmatch(codes, code)} == faults
    # A caller who is refused as often as it likes must not lower the share.
    others = {"ok", "cancelled", "deadline_exceeded"}
    assert {code for code in {*TABLE, *others} if re.fullmatch(total, code)} == faults | others
    (codes,) = re.findall(r'code=~"([^"]+)"', expressions["PomeloProviderFails"])
    vendors = {code for code in TABLE if code.startswith("provider_")} | {"deadline_exceeded"}
    assert {code for code in TABLE if re.fullmatch(codes, code)} == vendors
    assert 'code="provider_failed", upstream_status="4xx"' in expressions["PomeloProviderRefuses"]
    (operations,) = re.findall(r'operation=~"([^"]+)"', expressions["PomeloStoreSlow"])
    assert {each for each in OPERATIONS if re.fullmatch(operations, each)} == set(operations.split("|"))


def test_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells
        assert place["x"] + place["w"] <= 24
        cells |= own


NEEDS_PROMTOOL = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (apt-get install prometheus)"
)


@NEEDS_PROMTOOL
def test_promtool_accepts_the_alerts_and_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    queries = tmp_path / "queries.yml"
    recorded = [
        {"record": f"query:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(expressions())
    ]
    queries.write_text(json.dumps({"groups": [{"name": "queries", "rules": recorded}]}))
    for file in (ALERTS, queries):
        found = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr


def check_alerts(
    folder: Path, alert: str, series: dict[str, str], expected: list[tuple[int, list[dict[str, Any]]]]
) -> None:
    """Evaluates an alert on series of one value a minute. `expected` are minutes and what fires then."""
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": alerts}
            for minute, alerts in expected
        ],
    }
    file = folder / "case.yml"
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "tests": [case]}))
    found = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@NEEDS_PROMTOOL
@pytest.mark.parametrize(
    ("alert", "metric", "worker"),
    [("PomeloNotReady", "pomelo_ready", "0"), ("PomeloWorkerDown", "pomelo_worker_up", "1")],
)
def test_a_server_that_is_not_ready_or_whole_is_an_alert_unless_it_drains(
    tmp_path: Path, alert: str, metric: str, worker: str
) -> None:
    (rule,) = [each for each in rules() if each["alert"] == alert]
    summary = rule["annotations"]["summary"]
    for name, value in (("worker", worker), ("instance", "b")):
        summary = summary.replace(f"{{{{ $labels.{name} }}}}", value)
    labels = {**rule["labels"], "instance": "b", "worker": worker}
    fires = [{"exp_labels": labels, "exp_annotations": {**rule["annotations"], "summary": summary}}]
    series = {
        f"{metric}{{instance='a', worker='{worker}'}}": "1x5 0x20",
        "pomelo_draining{instance='a', worker='0'}": "0x5 1x20",
        f"{metric}{{instance='b', worker='{worker}'}}": "1x5 0x20",
        "pomelo_draining{instance='b', worker='0'}": "0x25",
    }
    check_alerts(tmp_path, alert, series, [(5, []), (10, fires)])


@NEEDS_PROMTOOL
def test_an_open_circuit_is_an_alert_until_no_call_has_failed_for_a_while(tmp_path: Path) -> None:
    """Its first failures are all between two scrapes, so the counter begins with them."""
    (rule,) = [each for each in rules() if each["alert"] == "PomeloCircuitOpen"]
    labels = {"severity": "warning", "provider": "openai", "provider_model": "m"}
    summary = "m of openai is not called, because nearly all calls failed"
    fires = [{"exp_labels": labels, "exp_annotations": {**rule["annotations"], "summary": summary}}]
    series = {
        "pomelo_attempts_failed_total{instance='a', provider='openai', code='c', upstream_status='5xx'}": "_x20 5x40",
        "pomelo_attempts_failed_total{instance='a', provider='openai', code='c', upstream_status='4xx'}": "0x60",
        "pomelo_attempts_failed_total{instance='b', provider='openai', code='c', upstream_status='5xx'}": "9x30 0x30",
        "pomelo_circuit_state{instance='a', provider='openai', provider_model='m'}": "_x20 2x40",
    }
    check_alerts(tmp_path, "PomeloCircuitOpen", series, [(22, fires), (34, fires), (37, [])])
