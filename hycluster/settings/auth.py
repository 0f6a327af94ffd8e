"""Who is let in, by which credentials, and over what."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from hycluster.errors import shown
from hycluster.settings.base import Strict

Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]  # fmt: skip
_LOCAL = re.compile(r"http://(127\.0\.0\.1|localhost|\[::1\])(:[0-9]+)?/")


class Oidc(Strict):
    """An identity provider whose tokens (JWTs) let in; docs/auth.md.

    Attributes:
        issuer: the ``iss`` of its tokens, to the letter.
        audience: what its tokens have as ``aud`` that are for this service.
        jwks_url: where it publishes its public keys; https, or on this machine.
        algorithms: with which tokens may be signed; public keys only.
        tenant_claim: of a token's claims the one with the tenant's name.
        project_claim: that with the project's.
        scopes_claim: that with the scopes, in a text with spaces or in a list: ``batch``, ``admin``, ``priority``,
            ``adapters``, and ``model:NAME`` for each model that it may use, or ``model:*`` for all.
        tenants: those that its tokens may be of; null is any. With several issuers, or with ``keys`` too, say it:
            whoever issues a token for a tenant is that tenant.
        admins: whether its tokens may have the scope ``admin``, which is over all tenants; null is only where they may
            be of any.
        keys_refresh_s: how old its keys get before they are fetched anew; one that is not known is fetched at once.
        keys_last_s: how old its keys may be while they can't be fetched; after that its tokens are answered 503.
    """

    issuer: str = Field(min_length=1)
    audience: str = Field(min_length=1)
    jwks_url: str
    algorithms: tuple[Algorithm, ...] = Field(default=("RS256", "ES256"), min_length=1)
    tenant_claim: str = Field(default="tenant", min_length=1)
    project_claim: str = Field(default="project", min_length=1)
    scopes_claim: str = Field(default="scope", min_length=1)
    tenants: tuple[str, ...] | None = None
    admins: bool | None = None
    keys_refresh_s: float = Field(default=300, gt=0)
    keys_last_s: float = Field(default=3600, gt=0)

    @field_validator("jwks_url")
    @classmethod
    def _is_safe(cls, url: str) -> str:
        if not url.startswith("https://") and not _LOCAL.match(url):
            raise ValueError(f"{shown(url)} is not allowed; must be https://..., as whoever changes it lets himself in")
        return url

    @property
    def may_administer(self) -> bool:
        return self.tenants is None if self.admins is None else self.admins


class ClientCertificates(Strict):
    """Certificates of callers (mTLS), which let in like a key: ``hycluster keys create --certificate NAME``.

    Attributes:
        authority: absolute path of a file with the authorities (PEM) by which they must be signed; it may be replaced
            while it is in use.
        required: nobody comes in without one, whatever else he has; but ``/health`` does over HTTP. gRPC asks for
            certificates only then.
    """

    authority: str = Field(pattern=r"^/.")
    required: bool = False


class Tls(Strict):
    """The certificate of both ingresses. The files may be replaced while they are in use: what is new is taken within
    two seconds.

    Attributes:
        certificate: absolute path of a file with the certificate and those that vouch for it (PEM), at each node that
            has an ingress process.
        key: that of its private key, without a password.
        clients: ask callers for theirs; null does not.
    """

    certificate: str = Field(pattern=r"^/.")
    key: str = Field(pattern=r"^/.")
    clients: ClientCertificates | None = None


class Auth(Strict):
    """Who is let in at both ingresses; docs/auth.md.

    Attributes:
        enabled: ask every caller for a credential.
        keys: whether API keys, which ``hycluster keys`` makes, are one.
        open: in words, that whoever reaches an ingress is let in: the network, or what stands in front, decides who
            that is. Without it and without ``enabled``, both ingresses listen on loopback only.
        oidc: identity providers whose tokens are one.
        tls: encrypt what callers say and hear; null does not. Without its ``clients`` it asks nobody who he is.
        database: where projects and keys are, as a URL of SQLAlchemy's, the same for all nodes; null is the variable
            HYCLUSTER_AUTH_DATABASE or, without it, an SQLite file in ``HYCLUSTER_HOME``, which is enough for one
            machine. Give one with a password by the variable: settings are shown in places.
        currency: of prices and budgets (ISO 4217, in small letters).
        poll_s: how often an ingress process looks for changes: a new key is known, a revoked one is dead after it.
        weights: by tenant, which share of an engine it gets where several want all of it, as one number against
            another; who is not named has 1.
        adapter_folder: absolute path, at all nodes, below which keys and tokens with the scope ``adapters`` may load
            LoRA adapters, from their own TENANT/PROJECT; what they load is their project's alone. null: only ``admin``
            may load any.
        grace_s: how long known keys go on while the database is away; unknown ones are answered 503 then.
        end_streams: end answers that run, at both ingresses, within two seconds after their key is revoked, expires, or
            its project is archived; without it they run to their end.
    """

    enabled: bool = False
    keys: bool = True
    open: bool = False
    oidc: tuple[Oidc, ...] = ()
    tls: Tls | None = None
    database: str | None = Field(default=None, min_length=1)
    currency: str = Field(default="usd", pattern=r"^[a-z]{3}$")
    poll_s: float = Field(default=0.5, gt=0, le=1)
    adapter_folder: str | None = Field(default=None, pattern=r"^/.")
    grace_s: float = Field(default=3600, ge=0)
    end_streams: bool = False
    weights: dict[str, Annotated[float, Field(ge=0.001, le=1000)]] = Field(default={})

    @model_validator(mode="after")
    def _open_or_not(self) -> Auth:
        if self.open and self.enabled:
            raise ValueError("open: true is not allowed with 'enabled: true'; it says that nobody is asked")
        if self.end_streams and not self.enabled:
            raise ValueError("end_streams: true is not allowed without 'enabled: true'; there are no keys to end")
        if self.adapter_folder is not None and not self.enabled:
            raise ValueError("adapter_folder: is of no use without 'enabled: true'; nobody has a project")
        if self.tls is not None and self.tls.clients is not None and not (self.enabled and self.keys):
            raise ValueError("tls.clients: is not allowed without 'enabled: true' and 'keys'; these know who it is")
        if self.oidc and not self.enabled:
            raise ValueError("oidc: is not asked for without 'enabled: true'")
        if self.enabled and not self.keys and not self.oidc:
            raise ValueError("keys: false is not allowed without 'oidc'; nobody could ever be let in")
        issuers = [each.issuer for each in self.oidc]
        for issuer in issuers:
            if issuers.count(issuer) > 1:
                raise ValueError(f"oidc: the issuer {shown(issuer)} is not allowed twice; it has one audience")
        return self
