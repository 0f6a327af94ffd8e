"""``hycluster k8s``: the manifests in ``k8s/``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hycluster.errors import SettingsError
from hycluster.terminal import echo

app = typer.Typer(
    name="k8s",
    help="Make the Kubernetes manifests in k8s/ from the settings, and check manifests.",
    no_args_is_help=True,
)


@app.callback()
def k8s() -> None:
    """Make the Kubernetes manifests in k8s/ from the settings, and check manifests."""


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
    it begins a new overlay; exits 1 while an overlay's kustomization does not list what is made for it.
    """
    from hycluster.k8s.chart.make import chart_files, surplus
    from hycluster.k8s.render import manifest_in, manifests, settings_of, unlisted
    from hycluster.k8s.render import render_manifests as rendered

    if config is not None and folder is None:
        raise SettingsError(f"CONFIG: {str(config)!r} needs --folder, the overlay or job to write to")
    if folder is not None and not folder.is_dir():
        raise SettingsError(f"--folder: {str(folder)!r} is no folder")
    root = Path()
    files: dict[Path, str] = {}
    wanting, gone = [], []
    for manifest in [manifest_in(folder)] if folder is not None else manifests(root):
        files |= rendered(manifest, config.as_posix() if config is not None else settings_of(manifest), root)
        wanting += unlisted(manifest.parent)
    if folder is None:
        files |= chart_files(root)
        gone = surplus(root, files)
    behind = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if not check:
        for path in behind:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path], encoding="utf-8")
        for path in gone:
            path.unlink()
    for path in behind:
        echo(f"{path}: differs from its settings" if check else f"{path}: written", err=check)
    for path in gone:
        echo(f"{path}: nothing makes it any more" if check else f"{path}: removed", err=check)
    for line in wanting:
        echo(line, err=True)
    if not behind and not gone and not wanting:
        echo("all as the settings say")
    raise typer.Exit(1 if wanting or (check and (behind or gone)) else 0)


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
    none, 1 if there is, 2 if what is given can't be read or built, or has nothing that could be checked.

        hycluster k8s check platform

        helm template hycluster ./chart | hycluster k8s check -
    """
    from hycluster.k8s.check import CheckError, faults, unknown
    from hycluster.k8s.sources import built, standard_input

    resources = standard_input() if source == "-" else built(Path(source))
    found = faults(resources, digests=digests)
    passed_over = unknown(resources)
    for name in passed_over:
        echo(f"not checked, there is no definition here: {name}", err=True)
    for fault in dict.fromkeys(map(str, found)):
        echo(fault)
    checked = len(resources) - len(passed_over)
    if not found and not checked:
        raise CheckError(f"{source}: nothing in it was checked; must have a manifest of a kind that is known here")
    if not found:
        echo(f"{checked} manifest{'s' if checked > 1 else ''}, all in order")
    raise typer.Exit(1 if found else 0)


@app.command()
def values(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SETTINGS|FOLDER|-",
            help="A settings file; or a folder with a kustomization.yaml, or - for manifests on standard input.",
            show_default=False,
        ),
    ],
) -> None:
    """Print the Helm chart's values for settings, with pods of their size, or for what kustomize makes.

    Run it in the repository. What it can't know, such as the image's place and the volume's, is yours to add.

        hycluster k8s values deployments/hunyuan-large-fp8-8xh20.yaml > large.yaml
    """
    import yaml

    from hycluster.k8s.chart.carry import left_behind
    from hycluster.k8s.chart.defaults import for_settings, values_of
    from hycluster.k8s.sources import built, standard_input

    if source != "-" and not Path(source).exists():
        raise SettingsError(
            f"SETTINGS: {source!r} is not there; give a settings file, a folder with a kustomization.yaml, or - for"
            " manifests on standard input"
        )
    if Path(source).is_file():
        found = for_settings(source, Path())
    else:
        resources = standard_input() if source == "-" else built(Path(source))
        found = values_of(resources)
        for line in left_behind(resources, Path()):
            echo(f"not carried over, the chart has no value for it: {line}", err=True)
    echo(yaml.safe_dump(found, sort_keys=False, width=120, allow_unicode=True), nl=False)
