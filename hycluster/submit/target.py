"""Where on Kubernetes a submitted job runs: what the command line says, and what of it goes together."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hycluster.errors import SettingsError, shown

# A DNS label, which KubeRay asks for in both.
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class KubernetesTarget:
    """The options of ``batch submit --kubernetes``; a field an option.

    Attributes:
        cluster: name of the RayCluster to run in; None is a cluster of the job's own.
        template: file with the manifest that a cluster of its own is taken from; None is one made for the job.
        image: of a cluster that is made for the job; None is the default.

    Raises:
        SettingsError: options that contradict each other, or a name that Kubernetes does not allow.
    """

    dry_run: bool = False
    namespace: str | None = None
    cluster: str | None = None
    template: str | None = None
    image: str | None = None

    def __post_init__(self) -> None:
        ways = [f"--{name}" for name in ("cluster", "template", "image") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise SettingsError(f"{ways[1]}: not allowed beside {ways[0]}, which says what cluster it is")

        for name in ("namespace", "cluster"):
            value = getattr(self, name)
            if value is not None and not _LABEL.fullmatch(value):
                raise SettingsError(
                    f"--{name}: {shown(value)} is not allowed; must be small letters, digits and dashes, at most 63"
                )

    def check_unused(self) -> None:
        """Raise SettingsError if any of them is given."""
        for name in ("dry_run", "namespace", "cluster", "template", "image"):
            if getattr(self, name):
                raise SettingsError(f"--{name.replace('_', '-')}: only allowed with --kubernetes")
