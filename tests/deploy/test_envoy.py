"""Envoy's configuration: its routes, and its time limits beside Pomelo's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pomelo.call import DEFAULT_TIMEOUT
from pomelo.gen.v1 import task_service_pb2
from pomelo.settings import Settings

FILE = Path(__file__).parents[2] / "deploy" / "envoy" / "pomelo.yaml"
RESOURCES: Any = yaml.safe_load(FILE.read_text())["static_resources"]


def seconds(duration: str) -> float:
    assert duration.endswith("s")
    return float(duration[:-1])


def connection_manager() -> Any:
    (listener,) = RESOURCES["listeners"]
    (chain,) = listener["filter_chains"]
    return chain["filters"][0]["typed_config"]


def routes() -> list[Any]:
    (host,) = connection_manager()["route_config"]["virtual_hosts"]
    found: list[Any] = host["routes"]
    return found


def test_every_cluster_is_that_of_a_route() -> None:
    clusters = {cluster["name"] for cluster in RESOURCES["clusters"]}
    assert {route["route"]["cluster"] for route in routes()} == clusters
    prefixes = [route["match"]["prefix"] for route in routes()]
    assert f"/{task_service_pb2.DESCRIPTOR.package}." in prefixes
    assert prefixes[-1] == "/", "the first route that matches is taken"


def test_no_time_limit_ends_a_task_that_pomelo_still_allows() -> None:
    limits = [connection_manager()["stream_idle_timeout"], *[route["route"]["timeout"] for route in routes()]]
    assert all(seconds(limit) > DEFAULT_TIMEOUT for limit in limits)


def test_envoy_closes_idle_connections_before_pomelo_does() -> None:
    rest, grpc = (
        seconds(options["common_http_protocol_options"]["idle_timeout"])
        for cluster in RESOURCES["clusters"]
        for options in cluster["typed_extension_protocol_options"].values()
    )
    assert Settings().idle_timeout is None, "75 s"
    assert rest < 75
    assert grpc < 300, "grpc.max_connection_idle_ms"


def test_only_what_no_server_has_seen_is_sent_again() -> None:
    for route in routes():
        conditions = set(route["route"]["retry_policy"]["retry_on"].split(","))
        assert conditions == {"connect-failure", "refused-stream", "reset-before-request"}


def test_envoy_sends_calls_only_to_servers_that_accept_them() -> None:
    rest, grpc = (cluster["health_checks"] for cluster in RESOURCES["clusters"])
    assert [check["http_health_check"]["path"] for check in rest] == ["/healthz"]
    assert [check["grpc_health_check"] for check in grpc] == [{}]


def test_envoy_takes_as_many_calls_as_connections_and_old_tls_is_refused() -> None:
    for cluster in RESOURCES["clusters"]:
        (thresholds,) = cluster["circuit_breakers"]["thresholds"]
        assert min(thresholds.values()) >= Settings().max_connections
    (listener,) = RESOURCES["listeners"]
    context = listener["filter_chains"][0]["transport_socket"]["typed_config"]["common_tls_context"]
    assert context["tls_params"] == {"tls_minimum_protocol_version": "TLSv1_2"}
