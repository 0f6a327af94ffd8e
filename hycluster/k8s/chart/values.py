"""What the chart's values may be: their names, kinds and meaning, from which schema, defaults and README are made.

Helm knows a value's own kind and bounds from the schema. What depends on several of them is in the chart's
``_checks.tpl``, and all the rest in ``hycluster k8s check``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from hycluster.k8s.render import POD_STORE
from hycluster.k8s.rules.objects import HUB_ID
from hycluster.k8s.rules.syntax import MAX_GRACE_S
from hycluster.settings.base import LabelKey, LabelValue
from hycluster.settings.settings import Settings

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")] | Annotated[int, Field(ge=1)]
Size = Annotated[str, Field(pattern=r"^[1-9][0-9]*(Mi|Gi|Ti)$")]
# What Kubernetes takes for the name of an object, or none.
DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
NoOrDnsName = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)?$")]
HostName = Annotated[str, Field(pattern=r"^(\*\.)?[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
Tag = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]
Digest = Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")]
Cidr = Annotated[str, Field(pattern=r"^[0-9a-fA-F.:]+/[0-9]{1,3}$")]
HubId = Annotated[str, Field(pattern=f"^({HUB_ID})?$")]
Labels = dict[LabelKey, LabelValue]


class Values(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, populate_by_name=True)


class Namespace(Values):
    name: NoOrDnsName = Field(default="", description="Where all of it goes; empty: the release's own (--namespace).")
    create: bool = Field(
        default=False,
        description="Make the namespace, with the restricted pod security standard. It stays when the release goes:"
        " KubeRay still has something to do in it.",
    )


class PriorityClasses(Values):
    create: bool = Field(
        default=True,
        description="Make hycluster-control, -engines and -jobs; false where k8s/cluster was applied, or another"
        " release made them: they are the cluster's, not the namespace's.",
    )


class Image(Values):
    repository: str = Field(
        pattern=r"^[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)*$",
        description="Where the image is, without tag: registry.example.com/hycluster.",
    )
    tag: Tag = Field(description="Which one; -cpu or -gpu of the version. 'latest' is refused.")
    digest: Digest = Field(default="", description="sha256:..., to pin it; then the tag is for readers only.")
    pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = Field(
        default="", description="Empty: Kubernetes' own choice, IfNotPresent."
    )


class Toleration(Values):
    key: str = Field(default="")
    operator: Literal["Exists", "Equal"] = Field(default="Equal")
    value: str = Field(default="")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field(default="")
    toleration_seconds: int | None = Field(default=None)


class Resources(Values):
    requests: dict[str, Quantity] = Field(
        description="At least cpu and memory.", json_schema_extra={"required": ["cpu", "memory"]}
    )
    limits: dict[str, Quantity] = Field(
        description="The memory must be what is requested.", json_schema_extra={"required": ["memory"]}
    )


class Pods(Values):
    resources: Resources = Field(description="What the container asks for and may use.")
    priority_class_name: NoOrDnsName = Field(default="", description="The PriorityClass; empty: none.")
    node_selector: Labels = Field(default={}, description="Labels of the nodes to run on.")
    tolerations: tuple[Toleration, ...] = Field(default=(), description="Taints of nodes that are no hindrance.")


class EngineGroup(Pods):
    priority_class_name: NoOrDnsName = Field(default="hycluster-engines", description="The PriorityClass; empty: none.")
    hosts: int = Field(default=1, ge=1, le=64, description="Pods of one replica, on a node each.")
    ray_resources: dict[str, Annotated[str, Field(pattern=r"^[0-9.]+$")]] = Field(
        default={}, description="What Ray is told that such a pod has besides: hardware.resources of the settings."
    )
    shared_memory: Size = Field(default="1Gi", description="Of /dev/shm, through which one engine's ranks talk.")


class Weights(Values):
    enabled: bool = Field(default=False, description="A volume for all nodes, at /models, and a step that fills it.")
    repo: HubId = Field(default="", description="Hub id of the weights: tencent/Tencent-Hunyuan-Large.")
    revision: str = Field(default="main", min_length=1, description="Branch, tag or commit there.")
    folder: str = Field(
        default="",
        description="One of its folders; then the settings' source is /models/FOLDER, and otherwise the hub id.",
    )
    size: Size = Field(default="1Ti", description="Of the volume.")
    storage_class_name: NoOrDnsName = Field(
        default="", description="Storage that many nodes mount at once (ReadWriteMany); empty: the cluster's default."
    )


class PasswordSecret(Values):
    name: DnsName = Field(default="hycluster-redis", description="A Secret in the same namespace.")
    key: str = Field(default="password", min_length=1, description="Key of the password in it.")


class Redis(Pods):
    enabled: bool = Field(default=True, description="One Redis with a disk. Production brings its own, replicated.")
    address: str = Field(
        default="",
        pattern=r"^([A-Za-z0-9.-]+:[0-9]{1,5})?$",
        description="HOST:PORT of another Redis; needed where enabled is false, and for that only.",
    )
    cidrs: tuple[Cidr, ...] = Field(min_length=1, description="Where the other Redis is.")
    password_secret: PasswordSecret = Field(default=PasswordSecret(), description="Where the password is.")
    image: str = Field(
        pattern=r"^[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)*:[A-Za-z0-9_.-]+(@sha256:[0-9a-f]{64})?$",
        description="With its tag, and a digest to pin it.",
    )
    size: Size = Field(default="2Gi", description="Of the disk.")
    storage_class_name: NoOrDnsName = Field(default="", description="Of the disk; empty: the cluster's default.")


class Rdma(Values):
    enabled: bool = Field(
        default=False,
        description="Engines over several hosts talk through the fabric; their resources name its device too.",
    )
    resource: str = Field(
        default="rdma/rdma_shared_device_a",
        pattern=r"^[a-z0-9.-]+/[A-Za-z0-9_.-]+$",
        description="As its device plugin names it; each engine pod takes one.",
    )
    environment: dict[str, str] = Field(default={}, description="NCCL's variables, for your adapters and interfaces.")
    ipc_lock: bool = Field(
        default=False,
        description="Engines may lock memory, and are root for it, with no other capability; the namespace must allow"
        " that. Try without it first.",
    )


class AuthFilter(Values):
    group: str = Field(min_length=1, description="Of its kind.")
    kind: str = Field(min_length=1, description="As your Gateway has it.")
    name: DnsName = Field(description="Its name in this namespace.")


class GatewayRoutes(Values):
    enabled: bool = Field(default=False, description="HTTPRoute and GRPCRoute, for a Gateway that ends TLS.")
    name: DnsName = Field(default="public", description="The Gateway.")
    namespace: DnsName = Field(default="gateways", description="Of the Gateway, from which its pods reach the ingress.")
    authenticated_by: str = Field(
        default="", description="In words, what else asks callers for credentials; then the routes have no filter."
    )
    auth_filter: AuthFilter = Field(
        description="A filter that asks callers for credentials; the ingress asks for none. A Gateway that does"
        " not know"
        " it answers with an error."
    )


class IngressRoutes(Values):
    enabled: bool = Field(default=False, description="An Ingress for HTTP and one for gRPC.")
    class_name: NoOrDnsName = Field(default="", description="The IngressClass; empty: the cluster's default.")
    namespace: DnsName = Field(
        default="ingress-nginx", description="Of the controller, from which its pods reach the ingress."
    )
    pod_labels: Labels = Field(
        default={}, description="Of the controller's pods; empty: app.kubernetes.io/name: ingress-nginx."
    )
    tls_secret_name: NoOrDnsName = Field(
        default="", description="A kubernetes.io/tls Secret with the hosts' certificate; empty: no TLS."
    )
    annotations: dict[str, str] = Field(
        default={},
        description="Of both, in your controller's words; one must have it ask callers for credentials, such as"
        " nginx.ingress.kubernetes.io/auth-url.",
    )
    grpc_annotations: dict[str, str] = Field(
        default={"nginx.ingress.kubernetes.io/backend-protocol": "GRPC"},
        description="Of the one for gRPC besides; a controller must be told that what is behind it speaks HTTP/2.",
    )


class Hosts(Values):
    http: tuple[HostName, ...] = Field(default=("llm.example.com",), min_length=1, description="For HTTP.")
    grpc: tuple[HostName, ...] = Field(default=("grpc.llm.example.com",), min_length=1, description="For gRPC.")


class Metrics(Values):
    enabled: bool = Field(default=False, description="ServiceMonitor and PodMonitor for Prometheus' operator.")
    namespace: DnsName = Field(default="monitoring", description="Of Prometheus, from which it reaches the pods.")
    pod_labels: Labels = Field(
        default={},
        description="Of Prometheus' pods; empty: app.kubernetes.io/name: prometheus. Who may read an ingress"
        " process's metrics may"
        " use its API.",
    )
    labels: Labels = Field(default={}, description="On the monitors, where the operator selects by label.")


class ClientPods(Values):
    namespace_labels: Labels = Field(min_length=1, description="Labels of their namespaces; a namespace has them all.")
    pod_labels: Labels = Field(
        default={},
        description="Labels of the pods; empty: all of them, which only namespaces labelled hycluster/clients may say.",
    )


class NetworkPolicies(Values):
    clients: tuple[ClientPods, ...] = Field(
        min_length=1, description="Whose pods may call the ingress, beside those of the own namespace."
    )
    api_server_cidrs: tuple[Cidr, ...] = Field(
        min_length=1, description="Where the API server is, which Ray's autoscaler asks for pods."
    )


class Autoscaler(Values):
    idle_timeout_seconds: int = Field(ge=60, description="A pod with nothing to do is given back after so long.")
    resources: Resources = Field(description="Of its container, in the head's pod.")


class ObjectStore(Values):
    secret_name: DnsName = Field(
        default="hycluster-s3",
        description="A Secret whose keys are put into the ingress' environment, such as AWS_ACCESS_KEY_ID and"
        " AWS_SECRET_ACCESS_KEY, if settings.batches.store is s3://...; need not be there.",
    )


class DatabaseSecret(Values):
    name: DnsName = Field(default="hycluster-auth", description="A Secret in the same namespace.")
    key: str = Field(default="database", min_length=1, description="Key of the URL in it.")


class KeysDatabase(Values):
    enabled: bool = Field(
        default=False,
        description="Ingress pods get its URL, and a way to it: where settings.auth.enabled is true, as API keys are"
        " asked for then.",
    )
    secret: DatabaseSecret = Field(
        default=DatabaseSecret(), description="Where its URL is: postgresql+psycopg://USER:PASSWORD@HOST/NAME."
    )
    cidrs: tuple[Cidr, ...] = Field(min_length=1, description="Where it is.")
    port: int = Field(default=5432, ge=1, le=65535, description="At which it listens.")


class Chart(Values):
    """All of them, in the order of values.yaml."""

    namespace: Namespace = Field(default=Namespace(), description="Where it is installed.")
    priority_classes: PriorityClasses = Field(
        default=PriorityClasses(), description="What goes first where there is no room for all."
    )
    image: Image = Field(description="What head, ingress and engines run.")
    image_pull_secrets: tuple[DnsName, ...] = Field(default=(), description="Names of Secrets for the registry.")
    token_secret_name: DnsName = Field(
        default="hycluster-ray", description="Secret with auth_token, by which Ray's processes know each other."
    )
    settings: Settings = Field(
        description="What is served and how: the content of a file as in deployments/. The chart sets hosts and ports"
        " of the ingress processes and what an ingress process reserves, and computes from it: the number of"
        " ingress and engine pods, the time"
        " that pods get to end, disruption budgets. hycluster k8s values FILE writes it, and the sizes of its pods.",
    )
    termination_grace_period_seconds: int | None = Field(
        default=None,
        ge=1,
        le=MAX_GRACE_S,
        description="Of ingress and engines; null: what settings.drain_timeout_s takes. Less than that is refused.",
    )
    head: Pods = Field(description="Ray's head: GCS, Serve's controller, dashboard, autoscaler. No traffic.")
    autoscaler: Autoscaler = Field(description="Ray's, which asks KubeRay for pods.")
    ingress_pods: Pods = Field(
        description="The ingress pods, which callers come to; as many as settings.ingress.replicas, and one more"
        " at need."
    )
    engines: tuple[EngineGroup, ...] = Field(
        min_length=1, description="Pods with engines: one entry for each of settings.models, in the same order."
    )
    weights: Weights = Field(default=Weights(), description="Weights on a volume.")
    hub_token_secret_name: DnsName = Field(
        default="hycluster-hub", description="Secret with token, for repositories that ask for one; need not be there."
    )
    hub_egress: bool = Field(
        default=False, description="Ingress and engines may reach the Internet, for a source that is a hub id."
    )
    object_store: ObjectStore = Field(default=ObjectStore(), description="Credentials of the Batch API's store.")
    keys_database: KeysDatabase = Field(description="The database of API keys, a PostgreSQL of yours.")
    redis: Redis = Field(description="What Ray's head must not lose.")
    hosts: Hosts = Field(default=Hosts(), description="Names that callers from outside use (gateway, ingress).")
    gateway: GatewayRoutes = Field(description="Callers from outside, by the Gateway API.")
    ingress: IngressRoutes = Field(default=IngressRoutes(), description="Callers from outside, by Ingress.")
    metrics: Metrics = Field(default=Metrics(), description="Prometheus.")
    network_policies: NetworkPolicies = Field(description="Who may talk to whom.")
    rdma: Rdma = Field(default=Rdma(), description="InfiniBand or RoCE between an engine's hosts.")
    gang_scheduling: bool = Field(
        default=False, description="All pods of a cluster are placed, or none; needs a scheduler that can."
    )


def group_defaults() -> dict[str, Any]:
    """Of an item of ``engines``: Helm itself has no defaults for a list's items."""
    fields = EngineGroup.model_fields.items()
    made = {field.alias or name: field.default for name, field in fields if not field.is_required()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in made.items()}


def values_schema() -> dict[str, Any]:
    """``values.schema.json``: draft 7, which every Helm knows."""
    made: dict[str, Any] = _draft7(Chart.model_json_schema())
    made["$schema"] = "http://json-schema.org/draft-07/schema#"
    # Helm puts in what charts above this one share.
    made["properties"]["global"] = {"type": "object"}
    # Of classes: they are for readers of the code, and long.
    for definition in (made, *made["definitions"].values()):
        definition.pop("description", None)
    # An ingress process alone is nobody's spare; the chart's groups and budgets count on two.
    made["definitions"]["Ingress"]["properties"]["replicas"] |= {"minimum": 2}
    # A relative folder is below a working folder, which pods do not have.
    made["definitions"]["Model"]["properties"]["source"] |= {"pattern": r"^[^.]"}
    _text(made["definitions"]["Batches"]["properties"]["store"])["pattern"] = POD_STORE
    made["definitions"]["Image"]["properties"]["tag"]["not"] = {"const": "latest"}
    return made


def _text(node: dict[str, Any]) -> dict[str, Any]:
    """The part of an optional text that is one."""
    part: dict[str, Any] = next(each for each in node["anyOf"] if each["type"] == "string")
    return part


def _draft7(node: Any) -> Any:
    if isinstance(node, list):
        return [_draft7(item) for item in node]
    if not isinstance(node, dict):
        return node.replace("#/$defs/", "#/definitions/") if isinstance(node, str) else node
    made = {("definitions" if key == "$defs" else key): _draft7(value) for key, value in node.items()}
    if isinstance(made.get("title"), str):
        del made["title"]
    if "patternProperties" in made:
        made["additionalProperties"] = False
    return made
