"""Envoy's configuration: every field exists and has the right type, by Envoy's own protobuf files. No package of Envoy
itself is available to the tests, so it is not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2  # noqa: F401 (a type that the file names)
from envoy.extensions.filters.network.http_connection_manager.v3.http_connection_manager_pb2 import (
    HttpConnectionManager,
)
from envoy.extensions.transport_sockets.tls.v3 import tls_pb2  # noqa: F401
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from google.protobuf import json_format

from pomelo.call import DEFAULT_TIMEOUT
from pomelo.gen.v1 import task_service_pb2
from pomelo.settings import Settings

FILE = Path(__file__).parents[2] / "deploy" / "envoy" / "pomelo.yaml"


def bootstrap() -> Any:
    return json_format.ParseDict(yaml.safe_load(FILE.read_text()), bootstrap_pb2.Bootstrap())


def http_connection_manager() -> HttpConnectionManager:
    (listener,) = bootstrap().static_resources.listeners
    (chain,) = listener.filter_chains
    manager = HttpConnectionManager()
    assert chain.filters[0].typed_config.Unpack(manager)
    return manager


def test_every_field_exists_and_every_cluster_that_a_route_names() -> None:
    clusters = {cluster.name for cluster in bootstrap().static_resources.clusters}
    (host,) = http_connection_manager().route_config.virtual_hosts
    assert {route.route.cluster for route in host.routes} == clusters
    assert f"/{task_service_pb2.DESCRIPTOR.package}." in {route.match.prefix for route in host.routes}


def test_no_time_limit_ends_a_task_that_pomelo_still_allows() -> None:
    manager = http_connection_manager()
    (host,) = manager.route_config.virtual_hosts
    limits = [manager.stream_idle_timeout, *[route.route.timeout for route in host.routes]]
    assert all(limit.seconds > DEFAULT_TIMEOUT for limit in limits)


def test_envoy_closes_idle_connections_before_pomelo_does() -> None:
    rest, grpc = bootstrap().static_resources.clusters
    idle = []
    for cluster in (rest, grpc):
        options = http_protocol_options_pb2.HttpProtocolOptions()
        (packed,) = cluster.typed_extension_protocol_options.values()
        assert packed.Unpack(options)
        idle.append(options.common_http_protocol_options.idle_timeout.seconds)
    assert Settings().idle_timeout is None, "75 s"
    assert idle[0] < 75
    assert idle[1] < 300, "grpc.max_connection_idle_ms"
