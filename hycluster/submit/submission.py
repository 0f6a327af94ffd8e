"""A job on its way to a cluster elsewhere: what is sent, and what makes no sense to send.

Job and settings travel inside the command that the cluster runs, ``hycluster batch run``, as two documents that its
shell hands over as open files. So nothing has to be uploaded, stored or mounted, the same text serves Ray's job API
and a RayJob, and whoever looks at the job in Ray's dashboard reads what it does.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hycluster.batch.job import Job
from hycluster.errors import SettingsError
from hycluster.settings.as_yaml import as_yaml
from hycluster.settings.settings import Settings

# Metadata of a job in Ray's job API, by which the commands know theirs.
NAME_KEY = "hycluster_job"
OUTPUT_KEY = "hycluster_output"
# KubeRay 1.7 takes at most 47 characters for the name of a RayJob; the same name is the id in Ray's job API.
MOST_ID_CHARACTERS = 47
_RANDOM_CHARACTERS = 6
# Letters and digits that nobody mistakes for one another.
_ALPHABET = "bcdfghjkmnpqrstvwxz23456789"
# A shell takes its command as one argument, of which Linux allows 128 KiB.
MOST_COMMAND_BYTES = 120_000
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Submission:
    """What a cluster is asked to run.

    Attributes:
        id: unique; letters, digits and dashes, at most 47.
        command: for a POSIX shell, of one or more lines.
        metadata: what is kept beside the job, for those who look at it later.
        notes: what the one who submits should know, a line each.
    """

    id: str
    command: str
    metadata: dict[str, str]
    notes: tuple[str, ...]


def submission(job: Job, settings: Settings | None, *, overwrite: bool = False) -> Submission:
    """Make ready what is sent.

    Args:
        settings: the deployment; needed for ``engine: dedicated`` only. The job's model alone is sent.
        overwrite: as in ``batch run``.

    Raises:
        SettingsError: a path or a setting that can't mean anything on another machine, or too much to send.
    """
    paths = (("input.path", job.input.path), ("output.path", job.output.path))
    notes = [note for field, path in paths if (note := _check_path(field, path))]
    documents = {"JOB": as_yaml(_told(job))}
    arguments = ["/dev/fd/3"]
    if job.engine == "dedicated":
        if settings is None:
            raise SettingsError("engine: 'dedicated' needs the settings of a deployment (--config)")
        sent, note = _engines(job, settings)
        documents["SETTINGS"] = as_yaml(sent)
        arguments += ["--config", "/dev/fd/4"]
        notes += [note] if note else []
    if overwrite:
        # It was asked for where somebody could be asked.
        arguments += ["--overwrite", "--yes"]
    command = _command(arguments, documents)
    size = len(command.encode())
    if size > MOST_COMMAND_BYTES:
        raise SettingsError(f"JOB: job and settings are {size} bytes; at most {MOST_COMMAND_BYTES} can be sent")
    metadata = {NAME_KEY: job.name, OUTPUT_KEY: job.output.path}
    return Submission(new_job_id(job.name), command, metadata, tuple(notes))


def new_job_id(name: str) -> str:
    """An id that tells the job's name and is not given twice; a DNS label, as Kubernetes wants its names."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    slug = slug if slug[:1].isalpha() else f"job-{slug}"
    slug = slug[: MOST_ID_CHARACTERS - _RANDOM_CHARACTERS - 1].rstrip("-")
    return f"{slug}-{''.join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARACTERS))}"


def _check_path(field: str, path: str) -> str | None:
    """A note, if there is something to know of this path.

    Raises:
        SettingsError: it means nothing on another machine, or must not be shown there.
    """
    from hycluster.storage import masked

    if masked(path) != path:
        raise SettingsError(
            f"{field}: {masked(path)!r} has keys in it, which Ray's dashboard would show; take them out"
            " and give them to the cluster (a role, or the AWS_* variables of its nodes)"
        )
    if "://" in path and not path.startswith("file://"):
        return None
    local = path.removeprefix("file://")
    if not Path(local).is_absolute():
        raise SettingsError(
            f"{field}: {path!r} is relative to this folder, which the cluster does not have; must be an s3:// URI"
            " or the absolute path of a volume that all its nodes see"
        )
    return f"{field}: {path!r} is a path on the cluster's nodes, not on this machine; all of them must see it"


def _told(job: Job) -> dict[str, Any]:
    """What the job says, without what it leaves to the defaults."""
    # Sampling is no pydantic model: which of its values were given is not known, which differ is.
    sampling = job.model_dump(mode="json", include={"sampling"}, exclude_defaults=True)
    return job.model_dump(mode="json", exclude={"sampling"}, exclude_unset=True) | sampling


def _engines(job: Job, settings: Settings) -> tuple[dict[str, Any], str | None]:
    """The settings with the job's model alone and without ingress processes, and what had to be changed in them."""
    model = settings.model(job.model)
    sent = settings.model_dump(
        mode="json", exclude={"models", "http", "grpc", "ingress", "batches"}, exclude_unset=True
    )
    sent["models"] = [model.model_dump(mode="json", exclude_unset=True)]
    host = settings.data_plane.host
    if host not in _LOOPBACK:
        return sent, None
    del sent["data_plane"]["host"]
    if not sent["data_plane"]:
        del sent["data_plane"]
    return sent, f"data_plane.host: {host!r} is left out; engines that listen there are not reached from other nodes"


def _command(arguments: list[str], documents: dict[str, str]) -> str:
    """A here-document each, from file descriptor 3 on. ``exec``: the signal that cancels a job reaches the job."""
    opened = [f"{number}<<'{name}'" for number, name in enumerate(documents, start=3)]
    # No line of a YAML mapping is one bare word, so none ends its document early.
    bodies = [f"{text}{name}" for name, text in documents.items()]
    return "\n".join([" ".join(["exec hycluster batch run", *arguments, *opened]), *bodies])
