"""Files for other machines, checked without one: their shape, what they refer to, and that no secret and no moving version is in them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
# kind -> apiVersion, and the fields its spec may have (those used here and their neighbours)
KINDS = {
    "ConfigMap": ("v1", None), "Kustomization": ("kustomize.config.k8s.io/v1beta1", None),
    "PersistentVolumeClaim": ("v1", {"accessModes", "resources", "storageClassName", "volumeMode"}),
    "Service": ("v1", {"selector", "ports", "type", "clusterIP"}),
    "Deployment": ("apps/v1", {"replicas", "revisionHistoryLimit", "strategy", "selector", "template", "minReadySeconds"}),
    "PodDisruptionBudget": ("policy/v1", {"minAvailable", "maxUnavailable", "selector"}),
    "HorizontalPodAutoscaler": ("autoscaling/v2", {"scaleTargetRef", "minReplicas", "maxReplicas", "metrics", "behavior"}),
}
CONTAINER = {"name", "image", "command", "args", "env", "envFrom", "ports", "startupProbe", "readinessProbe", "livenessProbe", "lifecycle", "resources",
             "securityContext", "volumeMounts", "workingDir", "imagePullPolicy"}
POD = {"automountServiceAccountToken", "terminationGracePeriodSeconds", "securityContext", "topologySpreadConstraints", "initContainers", "containers",
       "volumes"}
PROBE = {"httpGet", "periodSeconds", "timeoutSeconds", "failureThreshold", "initialDelaySeconds", "successThreshold"}


def objects() -> list[dict]:
    return [o for path in MANIFESTS for o in yaml.safe_load_all(path.read_text())]


def one(kind: str, name: str = "amhs") -> dict:
    found = [o for o in objects() if o["kind"] == kind and o["metadata"]["name"] == name]
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def pod():
    return one("Deployment")["spec"]["template"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_every_object_is_of_a_kind_and_has_its_fields(path):
    for found in yaml.safe_load_all(path.read_text()):
        version, fields = KINDS[found["kind"]]
        assert found["apiVersion"] == version
        if fields is not None:
            assert set(found) == {"apiVersion", "kind", "metadata", "spec"} and set(found["spec"]) <= fields
            assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", found["metadata"]["name"])


def test_pods_and_containers_have_only_fields_there_are(pod):
    assert set(pod["spec"]) <= POD
    for container in [*pod["spec"]["containers"], *pod["spec"]["initContainers"]]:
        assert set(container) <= CONTAINER
        assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
        assert container["securityContext"]["readOnlyRootFilesystem"] and not container["securityContext"]["allowPrivilegeEscalation"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["spec"]["securityContext"]["runAsNonRoot"] and pod["spec"]["automountServiceAccountToken"] is False


def test_names_and_labels_meet(pod):
    "Selectors find the pods, mounts their volumes, probes and services their port, references their objects."
    labels, spec = pod["metadata"]["labels"], pod["spec"]
    selectors = [one("Deployment")["spec"]["selector"]["matchLabels"], one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
                 one("Service")["spec"]["selector"], one("Service", "amhs-pods")["spec"]["selector"]]
    assert all(s.items() <= labels.items() for s in selectors)
    volumes = {v["name"]: v for v in spec["volumes"]}
    assert {m["name"] for c in [*spec["containers"], *spec["initContainers"]] for m in c["volumeMounts"]} == set(volumes)
    assert volumes["deployed"]["persistentVolumeClaim"]["claimName"] == one("PersistentVolumeClaim", "amhs-deployed")["metadata"]["name"]
    ports = {p["name"] for c in spec["containers"] for p in c["ports"]}
    assert {p["targetPort"] for s in ("amhs", "amhs-pods") for p in one("Service", s)["spec"]["ports"]} <= ports
    assert spec["containers"][0]["envFrom"] == [{"configMapRef": {"name": one("ConfigMap")["metadata"]["name"]}}]
    assert one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "amhs"}


def test_probes_ask_what_the_service_answers(pod):
    "BentoML serves /livez and /readyz; tests/test_integration.py waits for the latter."
    container = pod["spec"]["containers"][0]
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    assert all(set(container[name]) <= PROBE and container[name]["httpGet"]["port"] == "http" for name in paths)
    started_s = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
    assert started_s >= 60, "a cold compile and a slow volume take their time"
    stop = int(re.search(r"graceful-shutdown (\d+)", (DEPLOY / "Containerfile").read_text())[1])
    assert int(container["lifecycle"]["preStop"]["exec"]["command"][1]) + stop < pod["spec"]["terminationGracePeriodSeconds"]


def test_rolling_out_and_draining_leave_somebody_to_answer():
    deployment = one("Deployment")["spec"]
    assert deployment["replicas"] >= 2 and deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert one("PodDisruptionBudget")["spec"]["minAvailable"] >= 1
    scaler = one("HorizontalPodAutoscaler")["spec"]
    assert deployment["replicas"] <= scaler["minReplicas"] < scaler["maxReplicas"]


def test_settings_are_settings_of_the_library(pod):
    from amhs.config import Settings

    container = pod["spec"]["containers"][0]
    given = {e["name"] for e in container["env"]} | set(one("ConfigMap")["data"])
    given |= set(re.findall(r"AMHS_[A-Z]+(?==)", (DEPLOY / "Containerfile").read_text()))
    assert given <= {f"AMHS_{k.upper()}" for k in Settings.model_fields} | {"AMHS_ROOT", "AMHS_WORKERS"}
    mounts = {m["mountPath"] for m in container["volumeMounts"]}
    assert {one("ConfigMap")["data"]["AMHS_DEPLOYED"], str(Path(one("ConfigMap")["data"]["AMHS_KEYS"]).parent)} <= mounts


def test_secrets_come_by_reference_only(pod):
    assert not [o for o in objects() if o["kind"] == "Secret"]
    refs = {e["name"]: e["valueFrom"]["secretKeyRef"]["name"] for e in pod["spec"]["containers"][0]["env"]}
    readme = (DEPLOY / "README.md").read_text()
    assert refs == {"AMHS_STORE": "amhs-store"} and all(f"create secret generic {name}" in readme for name in ("amhs-store", "amhs-keys"))
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"://\w+:[^@\s…]+@|amhs_[0-9a-f]{8}_|PRIVATE KEY|password\s*[:=]", text, re.I), path.name
            assert str(ROOT) not in text and "-index-" not in text, path.name


def test_no_version_moves():
    told = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())
    assert {i["name"]: i["newTag"] for i in told["images"]}.keys() == {"amhs"}
    for path in [DEPLOY / "Containerfile", *MANIFESTS]:
        lines = [line.split("#")[0] for line in path.read_text().splitlines()]
        assert not re.search(r":latest|newTag: latest", "\n".join(lines)), path.name
    assert all(":" in line.split()[1] for line in (DEPLOY / "Containerfile").read_text().splitlines() if line.startswith("FROM"))


def test_kustomization_names_every_file():
    told = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())
    there = {p.name for p in (DEPLOY / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(told["resources"]) == there


def test_the_container_runs_what_a_bento_holds_without_rights():
    text = (DEPLOY / "Containerfile").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    words = {line.split()[0] for line in lines}
    assert words <= {"FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "EXPOSE", "VOLUME", "HEALTHCHECK", "CMD", "STOPSIGNAL"}
    user = next(line.split()[1] for line in lines if line.startswith("USER"))
    assert user.split(":")[0] not in ("0", "root")
    assert lines.index(f"USER {user}") > max(i for i, line in enumerate(lines) if line.startswith("RUN")), "nothing is installed with rights left over"
    assert "--require-hashes" in text and "src/requirements.lock" in text and "exec bentoml serve /bento" in text


def test_numbers_of_alerts_are_numbers_the_service_tells():
    api = (ROOT / "amhs/api.py").read_text()
    told = set(re.findall(r'"(amhs_[a-z_]+)"', api))
    rules = [r for g in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"] for r in g["rules"]]
    asked = {re.sub(r"_bucket$", "", m) for r in rules for m in re.findall(r"\bamhs_[a-z_]+", r["expr"])}
    assert asked and asked <= told
    assert all(r["labels"]["severity"] in ("warning", "critical") and r["annotations"]["summary"] for r in rules)


def test_prometheus_finds_the_pods():
    jobs = {j["job_name"]: j for j in yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]}
    service, name = one("Service", "amhs-pods"), jobs["amhs"]["dns_sd_configs"][0]
    told = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())
    assert name["names"] == [f"{service['metadata']['name']}.{told['namespace']}.svc.cluster.local"] and service["spec"]["clusterIP"] == "None"
    assert name["port"] == service["spec"]["ports"][0]["port"] and jobs["amhs"]["metrics_path"] == "/metrics"


def test_promtool_agrees(tmp_path):
    if not shutil.which("promtool"):
        pytest.skip("promtool is not here: scripts/system-packages.sh installs it")
    for kind, file in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        done = subprocess.run(["promtool", "check", kind, DEPLOY / "prometheus" / file], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    bad = (DEPLOY / "prometheus/alerts.yml").read_text().replace("rate(", "rat(")
    (tmp_path / "bad.yml").write_text(bad)
    assert subprocess.run(["promtool", "check", "rules", tmp_path / "bad.yml"], capture_output=True, timeout=60, check=False).returncode
