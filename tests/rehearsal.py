"""The dev overlay's cluster in nodes of its own, started as KubeRay starts it, and callers that count what they see.

What the pods are given (``ray start``'s parameters, resources, variables, Redis' arguments) and Serve's settings are
read from the built overlay. Not from it: two engine nodes of one CPU, so that one is spare, and a model that fits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from serve_overlay import Dashboard

from hycluster import logs
from hycluster.chaos.sse import event_lines
from hycluster.client import AsyncClient
from hycluster.core import Sampling
from hycluster.k8s.render import APP_NAME, PORTS
from hycluster.settings.observe import Logs
from tests.k8s.kustomize import K8S, ROOT, built
from tests.nodes import Network, Node, wait_for
from tests.ray_forks_launcher import WANTS_VLLM
from tests.ray_node_forks import MODULE, forks_for_nodes

HEAD, REDIS = "hycluster-head-svc", "hycluster-redis"
SECRETS = {("hycluster-ray", "auth_token"): "a-token-of-this-rehearsal", (REDIS, "password"): "a-password"}
TOKEN = SECRETS["hycluster-ray", "auth_token"]
RAY = "ray.scripts.scripts"
_OF_WORKERS = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
SHORT = 24
# Longer than any pause that is to be told from an end.
CALL_TIMEOUT_S = 90.0
GIB = {"Gi": 1 << 30, "Mi": 1 << 20}


def quantity(text: str) -> int:
    """Kubernetes' words for an amount of memory."""
    return int(text[:-2]) * GIB[text[-2:]]


class Rehearsal:
    """The overlay's cluster.

    Args:
        model: laid over the settings' first model.
        settings: laid over the settings.
        env: for all of Ray's nodes, over the manifest's.
        prepared: a folder of prepared models that workers begin with.
    """

    def __init__(
        self,
        network: Network,
        model: dict[str, Any],
        settings: dict[str, Any],
        env: dict[str, str] | None = None,
        prepared: Path | None = None,
    ) -> None:
        self.network = network
        self._env = env or {}
        self._prepared = prepared
        self._start_ray = RAY
        self._started: Counter[str] = Counter()
        manifests = built(K8S / "overlays" / "dev")
        service = next(resource["spec"] for resource in manifests if resource["kind"] == "RayService")
        self._redis = next(
            resource["spec"]["template"]["spec"]["containers"][0]
            for resource in manifests
            if resource["kind"] == "StatefulSet" and resource["metadata"]["name"] == REDIS
        )
        self._ray = service["rayClusterConfig"]
        self._groups = {group["groupName"]: group for group in self._ray["workerGroupSpecs"]}
        self.config: dict[str, Any] = yaml.safe_load(service["serveConfigV2"])
        self.settings: dict[str, Any] = self.config["applications"][0]["args"]
        self.settings["models"][0] |= model
        self.settings |= settings
        self.model = self.settings["models"][0]["name"]

    # -- nodes, as KubeRay and the kubelet make them -----------------------------------------------

    def start_redis(self) -> None:
        """At its own address and with its own disk, as a StatefulSet's pod."""
        node = self.network.nodes.get(REDIS) or self.network.add(REDIS)
        self.network.hosts[REDIS] = node.address
        home = node.folder / "home"
        # As the kubelet mounts the secret and the disk.
        (home / "password").write_text(SECRETS[REDIS, "password"])
        (script,) = self._redis["args"]
        script = script.replace("/run/secrets/redis", str(home)).replace("dir /data", f"dir {home}")
        node.start(shlex.join(["exec", *self._redis["command"], script]), self._variables(self._redis))
        wait_for(lambda: "Ready to accept" in node.log.read_text(), 30, "Redis starts")

    def start_head(self) -> Node:
        """A new head's pod, at an address of its own; the old one, if there is one, is gone."""
        if old := self.network.nodes.get("head"):
            old.remove()
        node = self.network.add("head")
        self.network.hosts[HEAD] = node.address
        group = self._ray["headGroupSpec"]
        container = group["template"]["spec"]["containers"][0]
        parameters = {"dashboard-host": "0.0.0.0", "no-monitor": "true", "redis-password": "$REDIS_PASSWORD"}
        redis = self._ray["gcsFaultToleranceOptions"]
        env = {
            "RAY_REDIS_ADDRESS": self._expanded(redis["redisAddress"], container),
            "REDIS_PASSWORD": self._value(redis["redisPassword"]),
            "RAY_external_storage_namespace": "a-uid-of-this-rehearsal",
        }
        self._start(node, "--head", group["rayStartParams"] | parameters, container, env)
        return node

    def await_start(self, node: Node, timeout_s: float = 240) -> None:
        """Until Ray runs there. One that ends before that is started again, as KubeRay makes another pod.

        A raylet gives its agents 15 s, which they may not have where all nodes share a few CPUs.
        """

        def started() -> bool:
            if "Ray runtime started" in node.log.read_text(errors="replace"):
                return True
            if not node.running:
                node.start_again()
            return False

        wait_for(started, timeout_s, f"Ray starts on {node.name}")

    def start_worker(self, group_name: str) -> Node:
        """A pod of a worker group."""
        self._started[group_name] += 1
        node = self.network.add(f"{_singular(group_name)}-{self._started[group_name]}")
        cache = node.folder / "home" / ".cache"
        if self._prepared is not None:
            shutil.copytree(self._prepared, cache / "hycluster" / "models")
        # What this user's vLLM has found out of models' classes. In an empty home each engine and each ingress process
        # imports vLLM once more for it.
        if (known := Path("~/.cache/vllm/modelinfos").expanduser()).is_dir():
            shutil.copytree(known, cache / "vllm" / known.name)
        group = self._groups[group_name]
        parameters = {"address": f"{HEAD}:6379", **group["rayStartParams"]}
        resources = {key: float(value) for key, value in group.get("resources", {}).items()}
        if "CPU" in resources:
            parameters["num-cpus"] = f"{resources.pop('CPU'):.0f}"
        if group_name == "engines":
            parameters["num-cpus"] = "1"
        if resources:
            parameters["resources"] = shlex.quote(json.dumps(resources))
        container = group["template"]["spec"]["containers"][0]
        self._start(node, "", parameters, container, _OF_WORKERS, self._start_ray)
        return node

    def _start(
        self,
        node: Node,
        kind: str,
        parameters: dict[str, str],
        container: dict[str, Any],
        env: dict[str, str],
        command: str = RAY,
    ) -> None:
        given = {
            "metrics-export-port": "8080",
            "dashboard-agent-listen-port": "52365",
            # Else a raylet waits for its agents to choose, and dies where that takes them over 15 s.
            "dashboard-agent-grpc-port": "52366",
            "runtime-env-agent-port": "52367",
            "block": "true",
            **parameters,
        }
        given.setdefault("memory", str(quantity(container["resources"]["limits"]["memory"])))
        flags = " ".join(f"--{key}" if value == "true" else f"--{key}={value}" for key, value in given.items())
        ray = f"{sys.executable} -m {command} start {kind} {flags}"
        node.start(f"ulimit -n 65536 || ulimit -n $(ulimit -Hn); {ray}", self._environment(container, env))

    def _environment(self, container: dict[str, Any], env: dict[str, str]) -> dict[str, str]:
        token = self.network.folder / "token"
        token.write_text(TOKEN)
        return {
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "RAY_AUTH_MODE": self._ray["authOptions"]["mode"],
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": "/tmp",
            # Four of them start at once here, on few CPUs.
            "RAY_raylet_start_wait_time_s": "60",
            "RAY_USAGE_STATS_ENABLED": "0",
            **self._variables(container),
            # All nodes share a few CPUs here: what Ray itself does is not to wait for ingress and engines.
            "RAY_worker_niceness": "10",
            **env,
            **self._env,
        }

    def _fork_workers(self) -> None:
        """From now on nodes with ingress and engines fork, of one process that imports vLLM now."""
        container = self._groups["engines"]["template"]["spec"]["containers"][0]
        environment = self.network.environment | self._environment(container, _OF_WORKERS)
        for_vllm = {
            WANTS_VLLM: "1",
            **logs.environment(Logs.model_validate(self.settings.get("logs") or {})),
            # Serve's controller has them, and so have those that it starts.
            **self.config["controller_options"]["runtime_env"]["env_vars"],
        }
        socket = self.network.closing.enter_context(forks_for_nodes(self.network.folder, environment, for_vllm))
        self._start_ray = f"{MODULE} {socket}"

    def _variables(self, container: dict[str, Any]) -> dict[str, str]:
        return {entry["name"]: self._value(entry) for entry in container.get("env", ())}

    def _expanded(self, text: str, container: dict[str, Any]) -> str:
        """With the container's variables in it, as the kubelet puts them."""
        for name, value in self._variables(container).items():
            text = text.replace(f"$({name})", value)
        return text

    @staticmethod
    def _value(entry: dict[str, Any]) -> str:
        if "value" in entry:
            return str(entry["value"])
        secret = entry["valueFrom"]["secretKeyRef"]
        return SECRETS[secret["name"], secret["key"]]

    # -- what there is -----------------------------------------------------------------------------

    @property
    def dashboard(self) -> Dashboard:
        return Dashboard(f"http://{self.network.nodes['head'].address}:8265", TOKEN)

    def serve(self, timeout_s: float) -> None:
        """Give Serve the settings, as the operator does once the head answers."""

        def deployed() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                self.dashboard.deploy(self.config)
                return True
            return False

        wait_for(deployed, timeout_s, "the head takes Serve's settings", every_s=1)

    def state(self) -> dict[str, Any]:
        """What Serve says of the application; {} while it says nothing."""
        with contextlib.suppress(httpx.HTTPError, KeyError):
            return self.dashboard.application(APP_NAME)
        return {}

    def start(self) -> None:
        """All nodes, then Serve's settings."""
        self._fork_workers()
        self.start_redis()
        self.await_start(self.start_head())
        self.serve(120)
        for group in ("ingress", "engines") * 2:
            self.await_start(self.start_worker(group))

    def controllers(self) -> set[int]:
        """Serve's controller, or none."""
        return set(self.network.nodes["head"].processes("ray::ServeController"))

    def running(self, ingresses: int = 2, replicas: int = 2) -> bool:
        """Serve says that all is as it should be."""
        deployments = self.state().get("deployments", {}).values()
        wanted = {f"ingress:{ingresses}", *(f"replica:{replicas}" for _ in self.settings["models"])}
        found = {
            f"{d['name'].split('-')[0]}:{sum(r['state'] == 'RUNNING' for r in d['replicas'])}"
            for d in deployments
            if d["status"] == "HEALTHY"
        }
        return found == wanted

    def processes(self) -> dict[str, set[int]]:
        """By node, the ingress and engines that run there."""
        return {
            name: set(node.processes(f":{APP_NAME}:"))
            for name, node in self.network.nodes.items()
            if name not in ("head", REDIS)
        }

    def able(self, node: Node) -> bool:
        """The node's ingress process would be found ready."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://{node.address}:{PORTS['http']}/health", timeout=2).status_code == 200
        return False


@dataclass
class Call:
    """One call, as its caller saw it.

    Attributes:
        pause_s: the longest time between two of its tokens, or before the first.
    """

    ingress: str
    way: str
    began: float
    ended: float = 0.0
    pause_s: float = 0.0
    tokens: int = 0
    error: str = ""


@dataclass
class Load:
    """Callers at both ingresses over both protocols, each at its ingress process whatever becomes of it; none tries
    twice.

    Attributes:
        ingress processes: by name, the address.
        long_tokens: beside the short ones, one long answer after the other at each ingress process; 0: none.
        silent: an ingress process of whose answers none comes any more; at the end nobody waits for them.
    """

    model: str
    ingresses: dict[str, str]
    per_s: float = 10.0
    long_tokens: int = 0
    silent: str = ""
    calls: list[Call] = field(default_factory=list)
    _limits: dict[asyncio.Timeout, str] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @contextlib.contextmanager
    def going(self) -> Iterator[Load]:
        """Within this, calls are made, by a thread of their own; at its end those under way are awaited."""
        ending = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            asking = thread.submit(lambda: asyncio.run(self._ask(ending)))
            try:
                yield self
            finally:
                ending.set()
                asking.result(CALL_TIMEOUT_S + 30)

    async def _ask(self, ended: threading.Event) -> None:
        async with contextlib.AsyncExitStack() as stack:
            https = {
                name: await stack.enter_async_context(
                    httpx.AsyncClient(
                        base_url=f"http://{address}:{PORTS['http']}", timeout=httpx.Timeout(CALL_TIMEOUT_S, connect=5)
                    )
                )
                for name, address in self.ingresses.items()
            }
            grpcs = {
                name: await stack.enter_async_context(AsyncClient(f"{address}:{PORTS['grpc']}"))
                for name, address in self.ingresses.items()
            }
            ending = asyncio.Event()
            callers = [asyncio.create_task(self._keep_asking(https, grpcs, ending))]
            if self.long_tokens:
                callers += [
                    asyncio.create_task(self._keep_streaming(name, grpcs[name], ending)) for name in self.ingresses
                ]
            await asyncio.to_thread(ended.wait)
            ending.set()
            for limit, ingress in list(self._limits.items()):
                if ingress == self.silent and not limit.expired():
                    limit.reschedule(asyncio.get_running_loop().time())
            await asyncio.gather(*callers)
            await asyncio.gather(*self._tasks)

    async def _keep_asking(
        self, https: dict[str, httpx.AsyncClient], grpcs: dict[str, AsyncClient], ending: asyncio.Event
    ) -> None:
        turns = [(name, way) for way in ("HTTP", "gRPC") for name in self.ingresses]
        next_at, turn = time.monotonic(), 0
        while not ending.is_set():
            name, way = turns[turn % len(turns)]
            chunks = self._over_http(https[name]) if way == "HTTP" else self._over_grpc(grpcs[name], SHORT)
            task = asyncio.create_task(self._call(Call(name, way, time.monotonic()), chunks, SHORT))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            turn, next_at = turn + 1, next_at + 1 / self.per_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), max(0.0, next_at - time.monotonic()))

    async def _keep_streaming(self, name: str, client: AsyncClient, ending: asyncio.Event) -> None:
        while not ending.is_set():
            call = Call(name, "long", time.monotonic())
            await self._call(call, self._over_grpc(client, self.long_tokens), self.long_tokens)
            # On few CPUs engines that never rest leave nothing for the start of what was lost.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), 2)

    async def _call(self, call: Call, chunks: AsyncIterator[int], expected: int) -> None:
        self.calls.append(call)
        last = call.began
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S) as limit:
                self._limits[limit] = call.ingress
                async for tokens in chunks:
                    now = time.monotonic()
                    call.pause_s, last = max(call.pause_s, now - last), now
                    call.tokens += tokens
            if call.tokens != expected:
                call.error = f"{call.tokens} tokens in place of {expected}"
        except Exception as error:
            call.error = f"{type(error).__name__}: {error}"[:200]
        del self._limits[limit]
        call.ended = time.monotonic()

    async def _over_http(self, http: httpx.AsyncClient) -> AsyncIterator[int]:
        body = {"model": self.model, "prompt": "hello", "max_tokens": SHORT, "ignore_eos": True, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body | {"return_token_ids": True}) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code} {(await answer.aread()).decode()[:150]}")
            last = ""
            async for line in event_lines(answer):
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(str(event["error"])[:150])
                    yield sum(len(choice["token_ids"] or ()) for choice in event["choices"])
                last = line or last
            if last != "data: [DONE]":
                raise RuntimeError(f"ended without a word, by {last[:80]!r}")

    async def _over_grpc(self, client: AsyncClient, tokens: int) -> AsyncIterator[int]:
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        async for chunk in client.stream(model=self.model, prompt="hello", sampling=sampling):
            yield sum(len(output.token_ids) for output in chunk.outputs)

    # -- what was seen -----------------------------------------------------------------------------

    def failed(self, ingress: str | None = None) -> list[Call]:
        return [call for call in self.calls if call.error and ingress in (None, call.ingress)]

    def told(self) -> str:
        """One line an ingress process."""
        lines = []
        for ingress in self.ingresses:
            calls = [call for call in self.calls if call.ingress == ingress]
            failed = self.failed(ingress)
            span = f", begun within {failed[-1].began - failed[0].began:.1f} s" if failed else ""
            pause = max((call.pause_s for call in calls if not call.error), default=0)
            reasons = Counter(call.error for call in failed).most_common(3)
            lines.append(
                f"{ingress}: {len(calls)} calls, {len(failed)} failed{span}; longest pause {pause:.2f} s"
                f" {reasons or ''}"
            )
        return "\n".join(lines)


def redis_missing() -> str | None:
    """Why Redis cannot be started here; None if it can."""
    return None if shutil.which("redis-server") else "needs redis-server (Debian's package of that name)"


def _singular(group_name: str) -> str:
    return group_name if group_name.endswith("ss") else group_name.removesuffix("s")
