"""Who is let in, by which credentials, and over what."""

from __future__ import annotations

from pydantic import Field, model_validator

from hycluster.settings.base import Strict


class Access(Strict):
    """Who is let in at both ingresses; docs/access.md.

    Attributes:
        keys: ask for API keys, which ``hycluster keys`` makes.
        open: in words, that whoever reaches an ingress is let in: the network, or what stands in front, decides who
            that is. Without it and without ``keys``, both ingresses listen on loopback only.
        database: where projects and keys are, as a URL of SQLAlchemy's, the same for all nodes; null is the variable
            HYCLUSTER_ACCESS_DATABASE or, without it, an SQLite file in ``HYCLUSTER_HOME``, which is enough for one
            machine. Give one with a password by the variable: settings are shown in places.
        poll_s: how often an ingress process looks for changes: a new key is known, a revoked one is dead after it.
        grace_s: how long known keys go on while the database is away; unknown ones are answered 503 then.
    """

    keys: bool = False
    open: bool = False
    database: str | None = Field(default=None, min_length=1)
    poll_s: float = Field(default=0.5, gt=0, le=1)
    grace_s: float = Field(default=3600, ge=0)

    @model_validator(mode="after")
    def _open_or_not(self) -> Access:
        if self.open and self.asks:
            raise ValueError("open: true is not allowed with 'keys'; it says that nobody is asked")
        return self

    @property
    def asks(self) -> bool:
        """Whether callers are asked who they are."""
        return self.keys
