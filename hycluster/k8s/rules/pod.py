"""Rules of every pod, whoever makes it."""

from __future__ import annotations

from collections.abc import Iterator

from hycluster.k8s.pods import ROLE, All, Broken, Pod, labels_of, name_of, quantity
from hycluster.k8s.rules.drain import RULES as RAY_POD_RULES
from hycluster.k8s.rules.drain import is_control

RAY_FOLDERS = ("/tmp", "/dev/shm", "/home/hycluster")
# What may be added in a namespace that allows it: locking memory for RDMA (k8s/components/rdma-ipc-lock).
CAPABILITIES = {"IPC_LOCK"}
ENFORCE = "pod-security.kubernetes.io/enforce"


def _user(pod: Pod, _all: All) -> Iterator[Broken]:
    security = pod.spec.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        user = security.get("runAsUser")
        yield Broken(
            "spec.securityContext.runAsNonRoot",
            f"{security.get('runAsNonRoot')} with user {user}",
            "be true, with a runAsUser that is not root",
            "who breaks out of the process is root in the container",
        )
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield Broken(
            "spec.securityContext.seccompProfile",
            str(security.get("seccompProfile")),
            "be {type: RuntimeDefault}",
            "the restricted pod security standard refuses the pod",
        )


def _unprivileged(pod: Pod, _all: All) -> Iterator[Broken]:
    for path, container in pod.containers:
        security = container.get("securityContext") or {}
        root = security.get("runAsUser") == 0 or security.get("runAsNonRoot") is False
        if root and "IPC_LOCK" not in _added(container):
            yield Broken(f"{path}.securityContext.runAsUser", "root", "be as the pod's", "only IPC_LOCK is a reason")
        for key, wanted in (("allowPrivilegeEscalation", False), ("readOnlyRootFilesystem", True)):
            if security.get(key) is not wanted:
                yield Broken(
                    f"{path}.securityContext.{key}", str(security.get(key)), f"be {str(wanted).lower()}", "house rule"
                )
        capabilities = security.get("capabilities") or {}
        if capabilities.get("drop") != ["ALL"] or not _added(container) <= CAPABILITIES or security.get("privileged"):
            yield Broken(
                f"{path}.securityContext.capabilities",
                str(capabilities or None),
                f"drop [ALL] and add nothing but {sorted(CAPABILITIES)}",
                "nothing here needs more, and the restricted pod security standard refuses it",
            )


def _added(container: dict[str, object]) -> set[str]:
    security = container.get("securityContext")
    capabilities = security.get("capabilities") if isinstance(security, dict) else None
    return set((capabilities or {}).get("add") or ())


def _locks_memory(pod: Pod, every: All) -> Iterator[Broken]:
    """A capability that is of use, in a namespace that allows it."""
    standards = {labels_of(namespace).get(ENFORCE) for namespace in every.of_kind("Namespace")}
    for path, container in pod.containers:
        if "IPC_LOCK" not in _added(container):
            continue
        security = {**(pod.spec.get("securityContext") or {}), **(container.get("securityContext") or {})}
        if security.get("runAsUser") != 0:
            yield Broken(
                f"{path}.securityContext.runAsUser",
                str(security.get("runAsUser")),
                "be 0 with IPC_LOCK",
                "the kernel gives added capabilities to root alone: RDMA would fail as without",
            )
        if standards & {"restricted", "baseline"}:
            yield Broken(
                f"{path}.securityContext.capabilities.add",
                "IPC_LOCK in a namespace that enforces " + " and ".join(sorted(map(str, standards))),
                "be in a namespace that enforces privileged (k8s/cluster-ipc-lock)",
                "the API server refuses the pod",
            )


def _no_secret_in_argv(pod: Pod, _all: All) -> Iterator[Broken]:
    for path, container in pod.containers:
        secret = {e["name"] for e in container.get("env") or () if "secretKeyRef" in (e.get("valueFrom") or {})}
        words = [*(container.get("command") or ()), *(container.get("args") or ())]
        for name in sorted(secret):
            if any(f"$({name})" in word for word in words):
                yield Broken(
                    f"{path}.args",
                    f"$({name}) is a secret's",
                    "be without secrets",
                    "every process of the node reads command lines, and so do logs",
                )


def _token(pod: Pod, _all: All) -> Iterator[Broken]:
    account = pod.spec.get("serviceAccountName")
    # The autoscaler is a container of the head and asks the API server for pods; KubeRay makes its account.
    if pod.autoscaled and account is None:
        return
    if not account or account == "default":
        yield Broken(
            "spec.serviceAccountName", str(account), "name an account without rights", "default's rights are others'"
        )
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield Broken(
            "spec.automountServiceAccountToken",
            str(pod.spec.get("automountServiceAccountToken")),
            "be false",
            "a token in a pod that runs models is a token for whoever breaks in",
        )


def _account_is_there(pod: Pod, every: All) -> Iterator[Broken]:
    accounts = [account["metadata"]["name"] for account in every.of_kind("ServiceAccount")]
    account = pod.spec.get("serviceAccountName")
    if accounts and account and account not in accounts:
        yield Broken(
            "spec.serviceAccountName",
            account,
            f"be one of the ServiceAccounts here: {', '.join(accounts)}",
            "no pod is made for an account that is not there; a namePrefix must reach here too",
        )


def _images(pod: Pod, every: All) -> Iterator[Broken]:
    for path, container in pod.containers:
        image = str(container.get("image"))
        if "@sha256:" in image:
            continue
        if every.digests:
            yield Broken(f"{path}.image", image, "be named by @sha256:DIGEST", "a tag can be moved; --digests asks so")
        elif image.rpartition("/")[2].partition(":")[2] in ("", "latest"):
            yield Broken(f"{path}.image", image, "name a version", "pods of one cluster would run different code")


def _image_is_for_the_hardware(pod: Pod, _all: All) -> Iterator[Broken]:
    """By our tags' ends: engines run on what their image was built for."""
    tag = str(pod.main.get("image")).partition("@")[0].rpartition("/")[2].partition(":")[2]
    gpus = pod.limit("nvidia.com/gpu")
    if gpus and tag.endswith("-cpu"):
        yield Broken(
            "spec.containers[0].image",
            f"{tag} with {gpus:g} GPUs",
            "be the image for GPUs (-gpu), or the pod have none",
            "the engine would not see them, and does not start",
        )
    if not gpus and tag.endswith("-gpu") and pod.role in ("engines", "job-engines"):
        yield Broken(
            "spec.containers[0].image",
            f"{tag} without a GPU",
            "be the image for CPUs (-cpu), or the pod have GPUs",
            "the engine finds no device, and does not start",
        )


def _pull_secrets(pod: Pod, every: All) -> Iterator[Broken]:
    """Pods of one image are pulled with the same secrets."""
    mine = pod.spec.get("imagePullSecrets") or []
    for other in every.pods:
        theirs = other.spec.get("imagePullSecrets") or []
        if pod.spec["containers"][0].get("image") == other.main.get("image") and len(theirs) > len(mine):
            yield Broken(
                "spec.imagePullSecrets",
                str(mine),
                f"be {theirs}, as in {other.owner} {other.path}",
                "the same image is pulled there with a secret, and would not be here",
            )
            return


def _resources(pod: Pod, _all: All) -> Iterator[Broken]:
    for path, container in pod.containers:
        resources = container.get("resources") or {}
        asked, most = resources.get("requests") or {}, resources.get("limits") or {}
        if missing := {"cpu", "memory"} - asked.keys():
            yield Broken(
                f"{path}.resources.requests",
                f"no {' and '.join(sorted(missing))}",
                "name cpu and memory",
                "the scheduler puts the pod where there is no room",
            )
        elif quantity(most.get("memory", 0)) != quantity(asked["memory"]):
            yield Broken(
                f"{path}.resources.limits.memory",
                str(most.get("memory")),
                f"be what is requested, {asked['memory']}",
                "Ray counts on the limit, and a node out of memory kills by the request",
            )


def _mounts(pod: Pod, every: All) -> Iterator[Broken]:
    volumes = {volume["name"] for volume in pod.spec.get("volumes") or ()}
    for set_ in every.of_kind("StatefulSet"):
        volumes |= {name_of(claim).partition("/")[2] for claim in set_["spec"].get("volumeClaimTemplates") or ()}
    for path, container in pod.containers:
        for index, mount in enumerate(container.get("volumeMounts") or ()):
            if mount["name"] not in volumes:
                yield Broken(
                    f"{path}.volumeMounts[{index}].name",
                    f"there is no volume {mount['name']}",
                    f"be one of {', '.join(sorted(volumes))}",
                    "the pod is refused",
                )
    if pod.group and (missing := set(RAY_FOLDERS) - {m["mountPath"] for m in pod.main.get("volumeMounts") or ()}):
        yield Broken(
            "spec.containers[0].volumeMounts",
            f"no {', '.join(sorted(missing))}",
            f"have {', '.join(RAY_FOLDERS)}",
            "the root filesystem is read-only, and Ray writes there",
        )


def _probes(pod: Pod, _all: All) -> Iterator[Broken]:
    if pod.role == "submitter" or not labels_of(pod.template).get(ROLE):
        return
    for probe in ("livenessProbe", "readinessProbe"):
        if probe not in pod.main:
            yield Broken(f"spec.containers[0].{probe}", "there is none", "be set", "KubeRay's own needs more rights")


def _priority(pod: Pod, every: All) -> Iterator[Broken]:
    """The control plane goes last."""
    if not pod.role:
        return
    mine = pod.spec.get("priorityClassName")
    if not mine:
        yield Broken(
            "spec.priorityClassName",
            "there is none",
            "name a class: the control plane's above the engines', those above the jobs'",
            "a full cluster evicts the head and the ingress for anybody's pods",
        )
    elif not is_control(pod):
        above = {p.spec.get("priorityClassName") for p in every.pods if is_control(p) and p.owner == pod.owner}
        if mine in above and not pod.owner.startswith(("RayJob", "RayCronJob")):
            yield Broken(
                "spec.priorityClassName",
                f"{mine}, as the head's and the ingress processes'",
                "be another class, below theirs",
                "an engine would push them out",
            )


RULES = (
    _user,
    _unprivileged,
    _locks_memory,
    _no_secret_in_argv,
    _token,
    _account_is_there,
    _images,
    _image_is_for_the_hardware,
    _pull_secrets,
    _resources,
    _mounts,
    _probes,
    _priority,
    *RAY_POD_RULES,
)
