"""The manifests: valid for Kubernetes, restricted, and in agreement with the program they start."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infinillm import config, rpc
from infinillm.servers import gateway

ROOT = Path(__file__).parents[2]
BASE = ROOT / "deploy/kustomize/base"
KUSTOMIZATION = yaml.safe_load((BASE / "kustomization.yaml").read_text())
DEFAULT_GRACE = 2  # seconds beyond the sleep and the drain


def manifests() -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of the base: our use of it is a namespace and an image's tag."""
    found = [each for name in KUSTOMIZATION["resources"] for each in yaml.safe_load_all((BASE / name).read_text())]
    tags = {image["name"]: image["newTag"] for image in KUSTOMIZATION["images"]}
    for each in found:
        if each["kind"] != "Namespace":
            each["metadata"]["namespace"] = KUSTOMIZATION["namespace"]
        for container in each.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ()):
            container["image"] += f":{tags[container['image']]}"
    return found


MANIFESTS = manifests()
WORKLOADS = [each for each in MANIFESTS if each["kind"] in {"Deployment", "StatefulSet"}]
names = [each["metadata"]["name"] for each in WORKLOADS]


def container_of(workload: dict[str, Any]) -> dict[str, Any]:
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return dict(container)


def settings_of(workload: dict[str, Any]) -> Any:
    """The container's arguments, read by the program itself."""
    command, *argv = (arg.replace("$(POD_NAME)", "worker-0") for arg in container_of(workload)["args"])
    return config.load(config.PROCESSES[command], argv, {})


@pytest.mark.parametrize("version", ["1.30", "1.33", "1.36"])
def test_kubernetes_takes_them(tmp_path: Path, version: str) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump_all(MANIFESTS))
    validate = [Path(sys.executable).parent / "kubernetes-validate", "--strict", "-k", version, str(file)]
    made = subprocess.run(validate, capture_output=True, text=True, timeout=120, check=False)
    assert made.returncode == 0, made.stdout + made.stderr


def test_the_base_lists_every_file() -> None:
    files = {path.name for path in BASE.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(KUSTOMIZATION["resources"])


@pytest.mark.parametrize("workload", WORKLOADS, ids=names)
def test_arguments_are_the_programs_own(workload: dict[str, Any]) -> None:
    settings = settings_of(workload)
    container = container_of(workload)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    match settings:
        case config.Gateway():
            assert ports == {"http": settings.port, "grpc": settings.grpc_port}
            scraped = settings.port
        case _:
            assert ports == {"grpc": settings.port, "metrics": settings.metrics_port}
            scraped = settings.metrics_port
    annotations = workload["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"prometheus.io/scrape": "true", "prometheus.io/port": str(scraped)}
    assert settings.host == "0.0.0.0"


def test_they_find_each_other() -> None:
    services = {each["metadata"]["name"]: each for each in MANIFESTS if each["kind"] == "Service"}
    by_kind = {type(settings_of(each)): settings_of(each) for each in WORKLOADS}
    led = next(each for each in WORKLOADS if each["metadata"]["name"] == "infinillm-controller")
    assert led["spec"]["serviceName"] in services
    pods = [f"infinillm-controller-{at}.{led['spec']['serviceName']}" for at in range(led["spec"]["replicas"])]
    addresses = ",".join(f"{pod}:{by_kind[config.Controller].port}" for pod in pods)
    assert by_kind[config.Worker].controller == by_kind[config.Gateway].controller == addresses
    pod, _, domain = by_kind[config.Worker].advertise.partition(".")
    assert (pod, domain) == (by_kind[config.Worker].id, f"infinillm-workers:{by_kind[config.Worker].port}")
    workers = next(each for each in WORKLOADS if each["metadata"]["name"] == "worker")
    assert workers["spec"]["serviceName"] in services
    assert by_kind[config.Worker].model == by_kind[config.Gateway].model
    assert by_kind[config.Worker].model in (ROOT / "deploy/Dockerfile").read_text()
    for service in services.values():
        (target,) = [w for w in WORKLOADS if w["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]]
        known = {port["name"] for port in container_of(target)["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= known


@pytest.mark.parametrize("workload", WORKLOADS, ids=names)
def test_probes_ask_health_by_its_names(workload: dict[str, Any]) -> None:
    container = container_of(workload)
    grpc = next(port["containerPort"] for port in container["ports"] if port["name"] == "grpc")
    asked = {probe: container[probe]["grpc"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert all(each["port"] == grpc for each in asked.values())
    assert asked["readinessProbe"]["service"] == rpc.READINESS
    assert asked["livenessProbe"]["service"] == asked["startupProbe"]["service"] == rpc.LIVENESS
    grace = workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert container["livenessProbe"]["terminationGracePeriodSeconds"] < grace


@pytest.mark.parametrize("workload", WORKLOADS, ids=names)
def test_a_drain_fits_its_grace(workload: dict[str, Any]) -> None:
    sleep = container_of(workload).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    settings = settings_of(workload)
    drain = settings.drain_seconds if isinstance(settings, config.Worker) else 0.0
    drain = gateway.DRAIN_SECONDS if isinstance(settings, config.Gateway) else drain
    assert workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > sleep + drain + DEFAULT_GRACE


@pytest.mark.parametrize("workload", WORKLOADS, ids=names)
def test_pods_are_restricted(workload: dict[str, Any]) -> None:
    pod, container = workload["spec"]["template"]["spec"], container_of(workload)
    assert pod["enableServiceLinks"] is False  # or a Service named like ours would set INFINILLM_... variables
    assert pod["automountServiceAccountToken"] is isinstance(settings_of(workload), config.Controller)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(container["resources"]["requests"]) == {"cpu", "memory"}
    assert "memory" in container["resources"]["limits"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert all("emptyDir" in volume for volume in pod["volumes"])


def test_policies_let_through_what_is_dialled_and_nothing_is_open_by_default() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in MANIFESTS if each["kind"] == "NetworkPolicy"}
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for workload in WORKLOADS:
        labels = workload["spec"]["selector"]["matchLabels"]
        (own,) = [p for p in policies.values() if p["podSelector"].get("matchLabels") == labels]
        opened = {port["port"] for rule in own["ingress"] for port in rule.get("ports", ())}
        assert opened == {port["containerPort"] for port in container_of(workload)["ports"]}
    budgets = [each["spec"]["selector"]["matchLabels"] for each in MANIFESTS if each["kind"] == "PodDisruptionBudget"]
    assert all(any(budget == w["spec"]["selector"]["matchLabels"] for w in WORKLOADS) for budget in budgets)


def test_controllers_may_do_with_their_lease_what_they_do_and_nothing_else() -> None:
    role, binding, account = (
        next(each for each in MANIFESTS if each["kind"] == kind) for kind in ("Role", "RoleBinding", "ServiceAccount")
    )
    (led,) = [each for each in WORKLOADS if isinstance(settings_of(each), config.Controller)]
    name = account["metadata"]["name"]
    assert led["spec"]["template"]["spec"]["serviceAccountName"] == name
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": KUSTOMIZATION["namespace"]}]
    assert settings_of(led).lease == f"kubernetes:{KUSTOMIZATION['namespace']}/infinillm-controller"
    rules = {(tuple(rule["verbs"]), tuple(rule.get("resourceNames", ()))) for rule in role["rules"]}
    assert rules == {(("create",), ()), (("get", "patch"), ("infinillm-controller",))}
    assert all(
        (rule["apiGroups"], rule["resources"]) == (["coordination.k8s.io"], ["leases"]) for rule in role["rules"]
    )


def test_the_image_runs_as_the_manifests_say() -> None:
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    assert "USER 65532:65532" in lines
    assert 'ENTRYPOINT ["infinillm"]' in lines
    (command,) = [yaml.safe_load(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD ")]
    assert isinstance(config.load(config.PROCESSES[command[0]], command[1:], {}), config.Serve)
    exposed = {int(port) for line in lines if line.startswith("EXPOSE ") for port in line.split()[1:]}
    used = {port["containerPort"] for each in WORKLOADS for port in container_of(each)["ports"]}
    assert used <= exposed
