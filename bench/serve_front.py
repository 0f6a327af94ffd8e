"""The same gateway and replicas behind Ray Serve's proxy, for comparison with the ingress process that listens itself.

python -m bench.serve_front SETTINGS.yaml PORT          (RAY_SERVE_ENABLE_HA_PROXY=1 for HAProxy)
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from typing import Any

from ray import serve

from hycluster import cluster
from hycluster.app import replicas
from hycluster.directory.directory import SHARED_DIRECTORY, open_directory
from hycluster.serving import deploy
from hycluster.settings.read import load_settings
from hycluster.settings.settings import Settings


def front(settings: Settings) -> Any:
    """A Serve ingress that holds the ingress process's app; it opens its gateway at its first request."""
    opened: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if "app" not in opened:
            from hycluster.gateway.generation import open_generators
            from hycluster.ingress.http import model_app

            stack = contextlib.AsyncExitStack()
            generator = await stack.enter_async_context(
                open_generators(
                    SHARED_DIRECTORY, settings.models, router=settings.router, admission=settings.admission, wait_s=300
                )
            )
            (gateway,) = generator.gateways.values()
            opened.update(stack=stack, app=await model_app(gateway, settings.http))
        await opened["app"](scope, receive, send)

    class Front:
        def __init__(self, *_: Any) -> None:
            open_directory()

    deployment = serve.deployment(name="front", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.01})
    return deployment(serve.ingress(lambda: app)(Front))


def main() -> None:
    settings, port = load_settings(sys.argv[1]), int(sys.argv[2])
    stop = threading.Event()
    cluster.start()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    bound = [replicas(model, settings, SHARED_DIRECTORY) for model in settings.models]
    serve.run(front(settings).bind(*bound), route_prefix="/")
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
    deploy.stop(0)


if __name__ == "__main__":
    main()
