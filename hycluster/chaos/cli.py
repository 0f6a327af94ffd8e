"""``hycluster chaos``: hit a served cluster while it is asked, and check every answer."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer

from hycluster.consent import Yes, ask
from hycluster.errors import SettingsError, shown
from hycluster.serving.running import choose
from hycluster.terminal import INTERRUPTED_EXIT, console, echo

FEATURES = "n, logprobs, stop"


def chaos(
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Model; default: the only one served.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of faults and requests: the same seed, the same run.")] = 0,
    count: Annotated[int, typer.Option(min=0, max=10_000, help="Number of faults; 0 only compares answers.")] = 10,
    every: Annotated[
        str,
        typer.Option(
            metavar="whole|SECONDS",
            help="When the next fault comes: once the pool is whole again, or at a fixed interval.",
        ),
    ] = "whole",
    faults: Annotated[
        str,
        typer.Option(
            metavar="KIND=SHARE,...",
            help="Mix of faults: kill (SIGKILL), stop (SIGSTOP), delay (stopped for a moment).",
        ),
    ] = "kill",
    targets: Annotated[
        str,
        typer.Option(
            metavar="PLACE=SHARE,...", help="What is hit: replica, ingress, batch (other processes with a gateway)."
        ),
    ] = "replica",
    together: Annotated[int, typer.Option(min=1, help="One of the faults hits this many replicas at once.")] = 1,
    streams: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Number of different requests; each is sent at least once.")
    ] = 100,
    concurrency: Annotated[int, typer.Option(min=1, max=10_000, help="Streams open at a time.")] = 16,
    prompt_tokens: Annotated[str, typer.Option(metavar="FROM-TO", help="Prompt lengths, roughly.")] = "8-256",
    output_tokens: Annotated[str, typer.Option(metavar="FROM-TO", help="Output lengths.")] = "16-128",
    ingresses: Annotated[
        str, typer.Option("--ingress", metavar="http,grpc", help="Which ingress the requests go to.")
    ] = "http,grpc",
    leave_out: Annotated[
        str, typer.Option(metavar="FEATURE,...", help=f"Features that requests do not use: {FEATURES}.")
    ] = "",
    stop_s: Annotated[
        float,
        typer.Option(min=0, help="Seconds after which a stopped process is resumed, if it was not replaced before."),
    ] = 60,
    delay_s: Annotated[
        float, typer.Option(min=0, max=60, help="Seconds for which a delayed process stands still.")
    ] = 1,
    patience_s: Annotated[float, typer.Option(min=1, help="Seconds that a request may take, retries included.")] = 300,
    recovery_s: Annotated[float, typer.Option(min=1, help="Seconds within which the pool must be whole again.")] = 300,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Ray cluster; default: RAY_ADDRESS, or what this HYCLUSTER_HOME has started."
        ),
    ] = None,
    http: Annotated[
        str | None, typer.Option(metavar="URL", help="The HTTP ingress; default: that of the cluster.")
    ] = None,
    grpc: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The gRPC ingress; default: that of the cluster.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    yes: Yes = False,
) -> None:
    """Kill, stop and delay processes of a running service under load, and check every answer.

    Says which service that is, and asks.
    The requests are asked undisturbed first; under faults greedy and seeded ones must be answered the same.
    Exit codes: 0 nothing failed and nothing was wrong; 1 otherwise; 2 wrong use; 130 interrupted.
    """
    from hycluster.chaos.schedule import FaultKind, FaultOptions, Where, pause, weights

    wish = FaultOptions(
        seed=seed,
        count=count,
        kinds=weights("--faults", faults, FaultKind),
        places=weights("--targets", targets, Where),
        every_s=pause(every),
        together=together,
    )
    if together > 1 and Where.REPLICA not in wish.places:
        raise SettingsError(f"--together: {together} is without effect; needs --targets replica")
    bounds = _bounds("--prompt-tokens", prompt_tokens), _bounds("--output-tokens", output_tokens)
    asked = _names("--ingress", ingresses, ("http", "grpc"))
    if not asked:
        raise SettingsError("--ingress: must name one or more of http, grpc")
    left_out = _names("--leave-out", leave_out, tuple(FEATURES.split(", ")))
    if http is not None and not http.startswith(("http://", "https://")):
        raise SettingsError(f"--http: {shown(http)} is not allowed; must begin with http:// or https://")

    # Before anything is looked at: whose cluster it is.
    choose(address)

    from hycluster.chaos.faults import Patience
    from hycluster.chaos.report import show_report
    from hycluster.chaos.run import ChaosPlan, run_chaos

    plan = ChaosPlan(
        faults=wish,
        patience=Patience(stop_s=stop_s, delay_s=delay_s, recovery_s=recovery_s),
        address=address,
        http=http,
        grpc=grpc,
        model=model,
        ingresses=[ingress for ingress in ("http", "grpc") if ingress in asked],
        streams=streams,
        concurrency=concurrency,
        prompt_tokens=bounds[0],
        output_tokens=bounds[1],
        features=[feature for feature in FEATURES.split(", ") if feature not in left_out],
        patience_s=patience_s,
    )
    try:
        found = run_chaos(plan, lambda line: echo(line, err=True), partial(ask, yes=yes))
    except KeyboardInterrupt:
        echo("stopped; what was held up runs on", err=True)
        raise typer.Exit(INTERRUPTED_EXIT) from None
    if as_json:
        echo(json.dumps(found.as_json(), indent=2))
    else:
        show_report(found, console())
    raise typer.Exit(0 if found.well else 1)


def _names(option: str, text: str, allowed: tuple[str, ...]) -> set[str]:
    found = {word.strip() for word in text.split(",") if word.strip()}
    for word in sorted(found.difference(allowed)):
        raise SettingsError(f"{option}: {shown(word)} is not allowed; must be of {', '.join(allowed)}")
    return found


def _bounds(option: str, text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    if low.isdecimal() and (high if dash else low).isdecimal() and 1 <= int(low) <= int(high if dash else low):
        return int(low), int(high if dash else low)
    raise SettingsError(f"{option}: {shown(text)} is not allowed; must be FROM-TO in tokens, such as 8-256")
