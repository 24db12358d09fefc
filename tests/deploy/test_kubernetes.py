"""The manifests for Kubernetes: valid by Kubernetes' own schemas, complete, and in agreement with each other."""

from __future__ import annotations

import tomllib
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pomelo.settings import Settings, SettingsError, load

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
OBJECTS = [each for path in FILES for each in yaml.safe_load_all(path.read_text())]
VERSIONS = ("1.32", "1.34", "1.37")


def named(kind: str, name: str = "pomelo") -> Any:
    (found,) = [each for each in OBJECTS if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


POD = named("Deployment")["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]


def configured(folder: Path) -> Settings:
    """Returns the settings of the container, with those of the example's Secret."""
    file = folder / "pomelo.toml"
    file.write_text(named("ConfigMap")["data"]["pomelo.toml"])
    variables = {each["name"]: each["value"] for each in CONTAINER["env"] if each["name"] != "POMELO_CONFIG"}
    return load(file, variables | named("Secret")["stringData"] | {"POMELO_SECRET": "s" * 32})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", OBJECTS, ids=lambda each: f"{each['kind']} {each['metadata']['name']}")
def test_a_manifest_is_valid_and_has_no_unknown_field(manifest: Any, version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_kustomization_has_every_manifest_but_the_example_of_a_secret() -> None:
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [path.name for path in FILES if path.name != "secret.example.yaml"]


def test_the_example_of_a_secret_is_refused() -> None:
    with pytest.raises(SettingsError, match="POMELO_SECRET: must have at least 32 characters"):
        load(None, {"POMELO_SECRET": named("Secret")["stringData"]["POMELO_SECRET"]})


def test_everything_selects_the_pods() -> None:
    labels = POD["metadata"]["labels"]
    selectors = [
        named("Deployment")["spec"]["selector"]["matchLabels"],
        named("Service", "pomelo-rest")["spec"]["selector"],
        named("Service", "pomelo-grpc")["spec"]["selector"],
        named("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        named("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selectors)


def test_ports_that_are_named_elsewhere_are_the_containers(folder: Path) -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    settings = configured(folder)
    for name, address in (("rest", settings.rest), ("grpc", settings.grpc)):
        assert ports[name] == int(address.rpartition(":")[2])
    used = {CONTAINER[f"{probe}Probe"]["httpGet"]["port"] for probe in ("startup", "liveness", "readiness")}
    used |= {
        port["targetPort"] for each in OBJECTS if each["kind"] == "Service" for port in each["spec"]["ports"]
    }
    used |= {port["port"] for rule in named("NetworkPolicy")["spec"]["ingress"] for port in rule["ports"]}
    assert used == set(ports)
    assert POD["metadata"]["annotations"]["prometheus.io/port"] == str(ports["admin"])


def test_only_prometheus_reaches_the_admin_port() -> None:
    (rule,) = [
        rule
        for rule in named("NetworkPolicy")["spec"]["ingress"]
        if {"protocol": "TCP", "port": "admin"} in rule["ports"]
    ]
    (source,) = rule["from"]
    assert source["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    assert source["namespaceSelector"]["matchLabels"]
    services = [
        port["name"] for each in OBJECTS if each["kind"] == "Service" for port in each["spec"]["ports"]
    ]
    assert "admin" not in services


def test_a_pod_ends_after_its_tasks(folder: Path) -> None:
    before = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["spec"]["terminationGracePeriodSeconds"] >= before + configured(folder).grace + 20


def test_a_pod_that_is_not_ready_gets_no_calls_and_is_not_killed() -> None:
    probed = {
        name: CONTAINER[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")
    }
    assert probed == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}


def test_a_new_version_takes_no_capacity_away_and_one_pod_at_a_time_is_evicted() -> None:
    assert named("Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert named("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_all_pods_share_their_media_and_only_the_cluster_is_trusted(folder: Path) -> None:
    settings = configured(folder)
    assert settings.media.startswith("s3://")
    assert all(ip_network(each).is_private for each in settings.trusted_proxies)


def test_each_service_leads_to_the_port_of_its_name() -> None:
    for name in ("rest", "grpc"):
        (port,) = named("Service", f"pomelo-{name}")["spec"]["ports"]
        assert port["targetPort"] == name


def test_pods_have_no_variables_of_services_which_pomelo_would_refuse() -> None:
    assert POD["spec"]["enableServiceLinks"] is False


def test_the_grpc_service_resolves_to_the_pods_and_several_run() -> None:
    assert named("Service", "pomelo-grpc")["spec"]["clusterIP"] == "None"
    assert named("HorizontalPodAutoscaler")["spec"]["minReplicas"] >= 2


def test_a_container_may_write_only_to_its_volumes() -> None:
    security = CONTAINER["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    of_the_pod = POD["spec"]["securityContext"]
    assert of_the_pod["runAsNonRoot"]
    assert of_the_pod["runAsUser"] == of_the_pod["fsGroup"] == 10001, "the user of the image"
    assert of_the_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert POD["spec"]["automountServiceAccountToken"] is False
    writable = [mount["mountPath"] for mount in CONTAINER["volumeMounts"] if not mount.get("readOnly")]
    (data,) = [each["value"] for each in CONTAINER["env"] if each["name"] == "POMELO_DATA"]
    assert writable == [str(Path(data).parent), "/tmp"]


def test_the_settings_file_has_no_secret() -> None:
    settings = tomllib.loads(named("ConfigMap")["data"]["pomelo.toml"])
    assert not settings.keys() & named("Secret")["stringData"].keys()
    assert not [
        name for name in settings if "key" in name or "secret" in name or name in ("store", "archive")
    ]
