"""The compose file: Docker's own command reads it, and its services are hardened."""

from __future__ import annotations

import json
import re
import subprocess
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from pomelo.settings import load
from tests.deploy.dockerfile import read_stages

DEPLOY = Path(__file__).parents[2] / "deploy"
EXAMPLE = DEPLOY / "example.env"


def run_config(variables: Path) -> subprocess.CompletedProcess[str]:
    options = ("--file", str(DEPLOY / "compose.yaml"), "--env-file", str(variables))
    command = ("docker-compose", *options, "config", "--format", "json")
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The resolved file, with the example's variables filled in."""
    variables = tmp_path_factory.mktemp("compose") / ".env"
    variables.write_text(re.sub(r"=$", "=" + "0" * 32, EXAMPLE.read_text(), flags=re.MULTILINE))
    found = run_config(variables)
    assert (found.returncode, found.stderr) == (0, "")
    return json.loads(found.stdout)


def servers(config: Any) -> dict[str, Any]:
    return {name: service for name, service in config["services"].items() if name.startswith("pomelo-")}


def test_the_example_has_no_secret_and_compose_says_what_is_missing() -> None:
    values = dict(re.findall(r"^(\w+)=(.*)$", EXAMPLE.read_text(), re.MULTILINE))
    assert {name for name, value in values.items() if value} == {"POMELO_PUBLIC_URL"}
    found = run_config(EXAMPLE)
    assert found.returncode == 1
    assert "POMELO_SECRET is missing a value: copy example.env to .env" in found.stderr


def test_the_example_has_every_variable_that_the_file_asks_for() -> None:
    asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    assert asked == set(re.findall(r"^(\w+)=", EXAMPLE.read_text(), re.MULTILINE))


def test_every_service_is_hardened_limited_and_of_a_version(config: Any) -> None:
    for name, service in config["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        assert service["restart"] == "unless-stopped", name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        image = service["image"].rpartition("/")[2]
        assert name in servers(config) or re.search(r":v?\d+\.\d+", image), image
        assert name in servers(config) or service["healthcheck"], "Pomelo's is in its image"


def test_a_vendors_key_is_that_of_the_operator() -> None:
    passed = re.findall(r"^ *(\w+): \$\{(\w+)", (DEPLOY / "compose.yaml").read_text(), re.MULTILINE)
    assert {name: variable for name, variable in passed if name != variable} == {
        "GF_SECURITY_ADMIN_PASSWORD": "GRAFANA_PASSWORD"
    }


def test_the_servers_share_media_and_the_archive_and_nothing_else(config: Any) -> None:
    mounts = [
        {mount["target"]: mount["source"] for mount in service["volumes"]}
        for service in servers(config).values()
    ]
    assert len(mounts) > 1
    for target in ("/var/lib/pomelo/media", "/var/lib/pomelo-archive"):
        assert len({mount[target] for mount in mounts}) == 1, target
    assert len({mount["/var/lib/pomelo"] for mount in mounts}) == len(mounts)


def test_only_one_server_starts_with_an_empty_store(config: Any) -> None:
    first, *others = servers(config)
    assert others
    for name in others:
        assert config["services"][name]["depends_on"][first]["condition"] == "service_healthy"


def test_only_the_servers_reach_redis(config: Any) -> None:
    assert config["networks"]["store"]["internal"]
    members = {name for name, service in config["services"].items() if "store" in service["networks"]}
    assert members == {"valkey", *servers(config)}
    assert set(config["services"]["valkey"]["networks"]) == {"store"}
    for service in servers(config).values():
        assert service["environment"]["POMELO_STORE"] == "redis://valkey:6379", "Valkey's own port"


def test_only_nginx_is_reached_from_other_machines(config: Any) -> None:
    published = {
        (name, port.get("host_ip", ""), port["published"])
        for name, service in config["services"].items()
        for port in service.get("ports", ())
    }
    assert published == {("nginx", "", "443"), ("grafana", "127.0.0.1", "3000")}


def test_files_that_are_mounted_exist_and_volumes_are_declared(config: Any) -> None:
    mounts = [mount for service in config["services"].values() for mount in service.get("volumes", ())]
    bound = {Path(mount["source"]) for mount in mounts if mount["type"] == "bind"}
    assert {path for path in bound if not path.exists()} <= {DEPLOY / "tls"}, "the operator's certificate"
    assert {mount["source"] for mount in mounts if mount["type"] == "volume"} == set(config["volumes"])


def test_folders_of_shared_volumes_belong_to_the_user_in_the_image(config: Any) -> None:
    (runtime,) = [s for s in read_stages(DEPLOY / "docker" / "Dockerfile") if s.name == "runtime"]
    made = runtime.last("RUN").split()
    for service in servers(config).values():
        assert {mount["target"] for mount in service["volumes"]} <= set(made)


def test_the_servers_settings_are_valid_and_only_nginx_is_trusted(config: Any) -> None:
    (network,) = config["networks"]["front"]["ipam"]["config"]
    nginx = ip_address(config["services"]["nginx"]["networks"]["front"]["ipv4_address"])
    assert nginx in ip_network(network["subnet"])
    assert nginx not in ip_network(network["ip_range"]), "another container could get it"
    for service in servers(config).values():
        settings = load(None, {name: str(value) for name, value in service["environment"].items()})
        assert [ip_network(each) for each in settings.trusted_proxies] == [ip_network(nginx)]
        assert duration(service["stop_grace_period"]) > settings.grace + 30


def test_redis_keeps_what_it_is_given(config: Any) -> None:
    valkey = config["services"]["valkey"]
    command = " ".join(valkey["command"])
    assert "--appendonly yes" in command
    assert "--appendfsync always" in command
    assert "--maxmemory-policy noeviction" in command
    (memory,) = re.findall(r"--maxmemory (\d+)mb", command)
    limit = int(valkey["deploy"]["resources"]["limits"]["memory"])
    assert int(memory) * 2**20 < limit * 0.8, "it would be killed instead of refusing what is too much"
    assert [mount["target"] for mount in valkey["volumes"]] == ["/data"]


def test_prometheus_and_nginx_know_every_server(config: Any) -> None:
    names = set(servers(config))
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scraped for static in job["static_configs"] for target in static["targets"]}
    assert targets == {f"{name}:9090" for name in names}
    upstreams = (DEPLOY / "compose" / "upstreams.conf").read_text()
    assert set(re.findall(r"server ([\w-]+):8080 ", upstreams)) == names
    assert set(re.findall(r"server ([\w-]+):50051 ", upstreams)) == names


def duration(text: str) -> int:
    """Returns the seconds of a duration such as 1m15s."""
    return sum(int(n) * {"h": 3600, "m": 60, "s": 1}[unit] for n, unit in re.findall(r"(\d+)([hms])", text))
