from __future__ import annotations

from hycluster.door import IngressAddresses
from hycluster.settings.ingress import Grpc, Http
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings
from hycluster.upgrade import _same_ports

MODEL = Model(name="m", source="/m")
INGRESSES = IngressAddresses("http://127.0.0.1:8123", "127.0.0.1:9123")


def test_a_free_port_is_the_one_that_is_open() -> None:
    settings = Settings(models=(MODEL,), http=Http(port=0), grpc=Grpc(port=0))
    same = _same_ports(settings, INGRESSES)
    assert (same.http.port, same.grpc.port) == (8123, 9123)


def test_a_port_that_is_given_is_taken() -> None:
    settings = Settings(models=(MODEL,), http=Http(port=1), grpc=Grpc(port=2))
    assert _same_ports(settings, INGRESSES) == settings
