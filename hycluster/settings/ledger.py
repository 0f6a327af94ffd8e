"""The usage ledger: who has had how many tokens of which model."""

from __future__ import annotations

from pydantic import Field, field_validator

from hycluster.settings.base import Strict
from hycluster.settings.ingress import is_no_typo


class Ledger(Strict):
    """The usage ledger, which ``hycluster usage`` adds up; docs/ledger.md.

    Attributes:
        enabled: write down what each request has had; null: where callers are asked who they are (``auth.enabled``).
        store: folder or ``s3://`` URI, the same for all nodes; null is ``ledger`` in the store of the batches or, where
            there is none, in ``HYCLUSTER_HOME``.
        cut_every_s: how often what a process has written is committed to the store. A machine that is lost for good
            takes what it has written since with it.
        cut_mib: it is committed earlier where it is so large.
        sync_every_s: how often what was written is forced to the disk: so much a machine that loses its power may lose,
            a process that is killed loses nothing. null: when it is committed.
    """

    enabled: bool | None = None
    store: str | None = Field(default=None, min_length=1)
    cut_every_s: float = Field(default=60, gt=0, le=86400)
    cut_mib: int = Field(default=16, ge=1, le=1024)
    sync_every_s: float | None = Field(default=1, gt=0, le=3600)

    _store_is_no_typo = field_validator("store")(is_no_typo)
