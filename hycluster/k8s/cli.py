"""``hycluster k8s``: the manifests in ``k8s/``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hycluster.errors import SettingsError

app = typer.Typer(name="k8s", help="The manifests in k8s/.", no_args_is_help=True)


@app.callback()
def k8s() -> None:
    """The manifests in k8s/."""


@app.command()
def render(
    config: Annotated[
        Path | None, typer.Argument(help="Settings file of a new overlay or job; needs --folder.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Only this overlay or job, such as k8s/overlays/dev.", show_default=False)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if a file is not as it would be.")
    ] = False,
) -> None:
    """Write the settings into the manifests in k8s/, from the files in deployments/ that they name, and the Helm chart.

    Run it in the repository, after every change in deployments/, k8s/base and k8s/components. With CONFIG and --folder
    it begins a new overlay.
    """
    from hycluster.k8s.chart.make import chart_files, surplus
    from hycluster.k8s.render import manifest_in, manifests, settings_of
    from hycluster.k8s.render import render as rendered

    if config is not None and folder is None:
        raise SettingsError(f"CONFIG: {str(config)!r} needs --folder, the overlay or job to write to")
    if folder is not None and not folder.is_dir():
        raise SettingsError(f"--folder: {str(folder)!r} is no folder")
    root = Path()
    files = {
        manifest: rendered(manifest, config.as_posix() if config is not None else settings_of(manifest), root)
        for manifest in ([manifest_in(folder)] if folder is not None else manifests(root))
    }
    gone = []
    if folder is None:
        files |= chart_files(root)
        gone = surplus(root)
    behind = [file for file, text in files.items() if not file.exists() or file.read_text(encoding="utf-8") != text]
    if not check:
        for file in behind:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(files[file], encoding="utf-8")
        for file in gone:
            file.unlink()
    for file in behind:
        typer.echo(f"{file}: differs from its settings" if check else f"{file}: written", err=check)
    for file in gone:
        typer.echo(f"{file}: nothing makes it any more" if check else f"{file}: removed", err=check)
    behind += gone
    if not behind:
        typer.echo("all as the settings say")
    raise typer.Exit(1 if check and behind else 0)


@app.command()
def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|-",
            help="A folder with a kustomization.yaml, or - for YAML on standard input.",
            show_default=False,
        ),
    ],
    digests: Annotated[bool, typer.Option("--digests", help="Images must be named by @sha256:DIGEST.")] = False,
) -> None:
    """Check manifests as they would be applied: a platform's own overlay, or what a chart renders.

    A line for each rule that is broken: whose, which field, what is there, what must be, and why. Exits 0 if there is
    none, 1 if there is, 2 if SOURCE can't be read or built.

        hycluster k8s check platform

        helm template hycluster ./chart | hycluster k8s check -
    """
    import sys

    from hycluster.k8s.check import faults, unknown
    from hycluster.k8s.sources import built, parsed

    resources = parsed(sys.stdin.read(), "standard input") if source == "-" else built(Path(source))
    found = faults(resources, digests=digests)
    for name in unknown(resources):
        typer.echo(f"not checked, there is no definition here: {name}", err=True)
    for fault in dict.fromkeys(map(str, found)):
        typer.echo(fault)
    if not found:
        typer.echo(f"{len(resources)} manifests, all in order")
    raise typer.Exit(1 if found else 0)


@app.command()
def values(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|-",
            help="A folder with a kustomization.yaml, or - for YAML on standard input.",
            show_default=False,
        ),
    ],
) -> None:
    """Print the Helm chart's values for manifests: for changing over from kustomize.

    hycluster k8s values k8s/overlays/hunyuan-large-fp8 > large.yaml
    """
    import sys

    import yaml

    from hycluster.k8s.chart.defaults import values_of
    from hycluster.k8s.sources import built, parsed

    resources = parsed(sys.stdin.read(), "standard input") if source == "-" else built(Path(source))
    typer.echo(yaml.safe_dump(values_of(resources), sort_keys=False, width=120, allow_unicode=True), nl=False)
