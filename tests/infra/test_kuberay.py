"""The Kubernetes manifests against KubeRay v1.7's validation rules, and their commands against the code."""

from __future__ import annotations

import ast
import copy
import re
import shlex
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from latentray.config import compose
from latentray.config.serve import ServeConfig

KUBERAY = Path(__file__).resolve().parents[2] / "infra" / "kuberay"
Manifest = dict[str, Any]


def manifests() -> dict[str, Manifest]:
    """Every Ray resource of the tree, by file."""
    found = {}
    for path in sorted(KUBERAY.rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if isinstance(document, dict) and document.get("apiVersion") == "ray.io/v1":
                found[path.relative_to(KUBERAY).as_posix()] = document
    return found


MANIFESTS = manifests()


def cluster_spec(manifest: Manifest) -> Manifest:
    spec = manifest["spec"]
    return {"RayCluster": lambda: spec, "RayJob": lambda: spec.get("rayClusterSpec") or {}}.get(
        manifest["kind"], lambda: spec.get("rayClusterConfig") or {}
    )()


def groups(cluster: Manifest) -> Iterator[Manifest]:
    if "headGroupSpec" in cluster:
        yield cluster["headGroupSpec"]
    yield from cluster.get("workerGroupSpecs", [])


def problems(manifest: Manifest) -> list[str]:
    """What the operator's admission refuses: ray-operator/controllers/ray/utils/validation.go, v1.7.0."""
    return [
        *name_problems(manifest),
        *cluster_problems(cluster_spec(manifest)),
        *KINDS[manifest["kind"]](manifest["spec"]),
    ]


def name_problems(manifest: Manifest) -> Iterator[str]:
    name = manifest["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 47:
        yield f"name {name!r} is no DNS-1035 label of at most 47 characters"


def cluster_problems(cluster: Manifest) -> Iterator[str]:
    if cluster and "headGroupSpec" not in cluster:
        yield "no headGroupSpec"
    for group in groups(cluster):
        pod = group["template"]["spec"]
        if not pod.get("containers"):
            yield "a group without a container"
        if "labels" in group.get("rayStartParams", {}):
            yield "labels belong into the group, not into rayStartParams"
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"]):
            yield "resources both in the group and in rayStartParams"
        if not all(isinstance(v, str) for v in group.get("rayStartParams", {}).values()):
            yield "rayStartParams takes strings"
    for group in cluster.get("workerGroupSpecs", []):
        low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if not 0 <= low <= group.get("replicas", low) <= high:
            yield f"{group['groupName']}: needs 0 <= minReplicas <= replicas <= maxReplicas"
    if len({g["groupName"] for g in cluster.get("workerGroupSpecs", [])}) < len(cluster.get("workerGroupSpecs", [])):
        yield "two groups of one name"
    if cluster.get("autoscalerOptions", {}).get("version") == "v2":
        if not cluster.get("enableInTreeAutoscaling"):
            yield "autoscaler v2 needs enableInTreeAutoscaling"
        if any(g["template"]["spec"].get("restartPolicy", "Never") != "Never" for g in groups(cluster)):
            yield "autoscaler v2 needs restartPolicy Never"
        if "RAY_enable_autoscaler_v2" in str(cluster):
            yield "autoscaler v2 is named twice"
    version = tuple(int(x) for x in str(cluster.get("rayVersion", "0")).split(".")[:2])
    if cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52):
        yield "token authentication needs rayVersion >= 2.52"
    for gated in ("networkPolicy", "tlsOptions", "historyServerOptions"):
        if gated in cluster:
            yield f"{gated} is behind an alpha gate"


def job_problems(spec: Manifest) -> Iterator[str]:
    if bool(spec.get("rayClusterSpec")) == bool(spec.get("clusterSelector")):
        yield "exactly one of rayClusterSpec and clusterSelector"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
        yield f"submissionMode {mode!r}"
    if spec.get("backoffLimit", 0) < 0 or (
        spec.get("backoffLimit") and (spec.get("clusterSelector") or mode == "InteractiveMode")
    ):
        yield "backoffLimit"
    if mode == "SidecarMode" and {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & set(spec):
        yield "SidecarMode has its own submitter"
    for deadline in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(deadline, 1) <= 0:
            yield f"{deadline} must be positive"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished is negative"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"


def service_problems(spec: Manifest) -> Iterator[str]:
    kind = spec.get("upgradeStrategy", {}).get("type", "NewCluster")
    if kind not in ("NewCluster", "None", "NewClusterWithIncrementalUpgrade"):
        yield f"upgradeStrategy {kind!r}"
    if kind == "NewClusterWithIncrementalUpgrade" and not (
        spec["upgradeStrategy"].get("clusterUpgradeOptions") and spec["rayClusterConfig"].get("enableInTreeAutoscaling")
    ):
        yield "an incremental upgrade needs clusterUpgradeOptions and the autoscaler"
    try:
        ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    except (pydantic.ValidationError, ValueError) as error:
        yield f"serveConfigV2: {error}"


KINDS: dict[str, Callable[[Manifest], Iterator[str]]] = {
    "RayCluster": lambda spec: iter(()),
    "RayJob": job_problems,
    "RayService": service_problems,
}


def serve_configs() -> dict[str, Manifest]:
    """Every serveConfigV2 of the tree, overlays' patches included."""
    found = {name: m["spec"]["serveConfigV2"] for name, m in MANIFESTS.items() if m["kind"] == "RayService"}
    for path in sorted((KUBERAY / "overlays").rglob("*.yaml")):
        patch = yaml.safe_load(path.read_text())
        for step in patch if isinstance(patch, list) else []:
            if step["path"].endswith("serveConfigV2"):
                found[path.relative_to(KUBERAY).as_posix()] = step["value"]
    return {name: yaml.safe_load(text) for name, text in found.items()}


def test_the_tree_holds_the_three_kinds() -> None:
    assert {m["kind"] for m in MANIFESTS.values()} == set(KINDS)


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_operator_accepts(name: str) -> None:
    assert problems(MANIFESTS[name]) == []


def put(*path: str | int, value: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        node: Any = manifest
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


JOB, SERVICE = "base/rayjob-train.yaml", "base/rayservice.yaml"


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (JOB, put("metadata", "name", value="Train_1"), "DNS-1035"),
        (JOB, put("spec", "clusterSelector", value={"ray.io/cluster": "x"}), "exactly one"),
        (JOB, put("spec", "submissionMode", value="SSH"), "submissionMode"),
        (JOB, put("spec", "ttlSecondsAfterFinished", value=-1), "negative"),
        (JOB, put("spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplicas", value=1), "minReplicas"),
        (JOB, put("spec", "rayClusterSpec", "enableInTreeAutoscaling", value=False), "enableInTreeAutoscaling"),
        (JOB, put("spec", "rayClusterSpec", "rayVersion", value="2.9.0"), "2.52"),
        (JOB, put("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus", value=0), "strings"),
        (SERVICE, put("spec", "upgradeStrategy", "type", value="Canary"), "Canary"),
        (
            SERVICE,
            put("spec", "serveConfigV2", value="applications: [{name: x, import_path: nowhere}]"),
            "serveConfigV2",
        ),
    ],
)
def test_a_fault_is_told(name: str, change: Callable[[Manifest], None], told: str) -> None:
    manifest = copy.deepcopy(MANIFESTS[name])
    change(manifest)
    assert told in "\n".join(problems(manifest))


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_confined(name: str) -> None:
    """A token on every cluster, no root, no literal secret, memory bounded, images of this repository."""
    cluster = cluster_spec(MANIFESTS[name])
    assert cluster["authOptions"] == {"mode": "token"}
    for group in groups(cluster):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert re.match(r"latentray-(train|serve):\d", container["image"])
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]
            assert all("secretKeyRef" in e["valueFrom"] for e in container.get("env", []))


@pytest.mark.parametrize("name", [n for n, m in MANIFESTS.items() if m["kind"] == "RayJob"])
def test_an_entrypoint_is_a_job_with_settings_it_knows(name: str) -> None:
    python, flag, module, *overrides = shlex.split(MANIFESTS[name]["spec"]["entrypoint"])
    assert (python, flag) == ("python", "-m")
    assert find_spec(module) is not None, module
    compose.compose(module.removeprefix("jobs."), overrides)


@pytest.mark.parametrize("name", serve_configs())
def test_an_application_exists_and_takes_its_arguments(name: str) -> None:
    config = ServeDeploySchema.model_validate(serve_configs()[name])
    for application in config.applications:
        module, attribute = application.import_path.split(":")
        spec = find_spec(module)
        assert spec is not None, module
        assert spec.origin is not None, module
        tree = ast.parse(Path(spec.origin).read_text())
        assert attribute in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        settings = pydantic.TypeAdapter(ServeConfig).validate_python(application.args)
        assert not settings.allow_anonymous
        assert config.http_options.host == settings.host
        assert config.http_options.port == settings.port
        assert config.http_options.request_timeout_s > settings.request_timeout_s, (
            "ours answers first, in OpenAI's form"
        )


@pytest.mark.parametrize("path", sorted(KUBERAY.rglob("kustomization.yaml")), ids=lambda p: p.parent.name)
def test_a_kustomization_names_what_exists(path: Path) -> None:
    kustomization = yaml.safe_load(path.read_text())
    for resource in kustomization["resources"]:
        assert (path.parent / resource).exists(), resource
    for patch in kustomization.get("patches", []):
        target = patch["target"]
        (manifest,) = [
            m for m in MANIFESTS.values() if (m["kind"], m["metadata"]["name"]) == (target["kind"], target["name"])
        ]
        patched = copy.deepcopy(manifest)
        for step in yaml.safe_load((path.parent / patch["path"]).read_text()):
            apply(step, patched)
        assert problems(patched) == []


def apply(step: Manifest, manifest: Manifest) -> None:
    """One JSON 6902 operation; a `replace` of something that is not there fails, as in kustomize."""
    *parents, last = [int(k) if k.isdigit() else k for k in step["path"].strip("/").split("/")]
    node: Any = manifest
    for key in parents:
        node = node[key]
    assert step["op"] == "add" or last in node or isinstance(last, int), step["path"]
    node[last] = step["value"]
