"""A way of running the cluster: one of ``deployments/*.yaml``."""

from __future__ import annotations

from pydantic import Field, model_validator

from hycluster.errors import SettingsError, shown
from hycluster.settings.auth import Auth
from hycluster.settings.base import Strict, home, is_loopback
from hycluster.settings.ingress import Batches, Grpc, Http, Ingress, Responses
from hycluster.settings.ledger import Ledger
from hycluster.settings.load import Admission, DataPlane, Router
from hycluster.settings.model import Model
from hycluster.settings.objectives import Objectives
from hycluster.settings.observe import Logs, Tracing

# Nodes wait for it: a day is a typo's bound, not a wish's.
MAX_DRAIN_S = 86400


class Settings(Strict):
    """A way of running the cluster: one of ``deployments/*.yaml``.

    Attributes:
        models: what is served; each model has a pool of replicas of its own.
        batches: OpenAI's Batch API at the HTTP ingress; null switches it off, and no response is stored then.
        responses: the keeping of responses; null switches it off.
        start_timeout_s: how long the engines of a pool may take to start.
        drain_timeout_s: how long requests in flight may go on where they are after a shutdown or replacement began.
        hand_over_after_s: how long a draining replica keeps its requests before they are migrated to other replicas, if
            there are any; without effect above ``drain_timeout_s``.
    """

    models: tuple[Model, ...] = Field(min_length=1)
    http: Http = Http()
    grpc: Grpc = Grpc()
    auth: Auth = Auth()
    ingress: Ingress = Ingress()
    router: Router = Router()
    admission: Admission = Admission()
    data_plane: DataPlane = DataPlane()
    batches: Batches | None = Batches()
    responses: Responses | None = Responses()
    ledger: Ledger = Ledger()
    tracing: Tracing = Tracing()
    logs: Logs = Logs()
    objectives: Objectives = Objectives()
    start_timeout_s: float = Field(default=600, gt=0)
    drain_timeout_s: float = Field(default=60, gt=0, le=MAX_DRAIN_S)
    hand_over_after_s: float = Field(default=10, ge=0)

    @model_validator(mode="after")
    def _names_differ(self) -> Settings:
        names = [name for model in self.models for name in model.names]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"models: the name {name!r} is given {names.count(name)} times; names must differ")
        return self

    @model_validator(mode="after")
    def _who_is_let_in(self) -> Settings:
        for name, host in (("http", self.http.host), ("grpc", self.grpc.host)):
            if not (self.auth.enabled or self.auth.open or is_loopback(host)):
                raise ValueError(
                    f"{name}.host: {shown(host)} lets other machines in, and nobody is asked who he is; set"
                    " 'auth.enabled: true', or say that it is meant so: 'auth.open: true'"
                )
        return self

    @property
    def keeps_ledger(self) -> bool:
        """Whether what requests have had is written down."""
        return self.auth.enabled if self.ledger.enabled is None else self.ledger.enabled

    @property
    def ledger_place(self) -> str:
        """The folder or URI that the ledger is."""
        return self.ledger.store or f"{self.batches.place if self.batches else home()}/ledger"

    def model(self, name: str) -> Model:
        """The model of that name, or the one that has an adapter of that name.

        Raises:
            SettingsError: there is none.
        """
        for model in self.models:
            if name in model.names:
                return model
        raise SettingsError(f"model: {shown(name)} is not in the settings; there are {[m.name for m in self.models]}")
