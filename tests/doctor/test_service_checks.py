from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hycluster.auth.database import bring_up_to_date, open_database
from hycluster.doctor.finding import Finding
from hycluster.doctor.service_checks import certificate, database, ledger, ports, ray_cluster, store
from hycluster.settings.auth import Auth, Tls
from hycluster.settings.ingress import Batches, Grpc, Http
from hycluster.settings.ledger import Ledger
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings
from tests.ingress.test_tls import write_pair


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "home"


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_ports(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(models=(Model(name="m", source="/m"),), http=Http(port=taken), grpc=Grpc(port=0))
    http, grpc = ports(settings)
    assert (http.verdict, f"sport = :{taken}" in http.todo) == ("bad", True)
    assert grpc.verdict == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert [found.verdict for found in ports(settings)] == ["ok"]


def test_the_ray_cluster(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no RAY_ADDRESS" in ray_cluster(None).what
    assert ray_cluster(f"127.0.0.1:{taken}").verdict == "ok"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        free = sock.getsockname()[1]
    found = ray_cluster(f"127.0.0.1:{free}")
    assert (found.verdict, found.what) == ("bad", f"--address: nobody answers at 127.0.0.1:{free}: Connection refused")
    assert ray_cluster("auto").verdict == "bad"
    assert "is no HOST:PORT" in ray_cluster("head").what
    monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{taken}")
    assert "without ray://" in ray_cluster(None).todo


def test_the_certificate(tmp_path: Path) -> None:
    assert certificate(Auth()).verdict == "ok"
    files = Tls(certificate=str(tmp_path / "cert.pem"), key=str(tmp_path / "key.pem"))
    found = certificate(Auth(tls=files))
    assert (found.verdict, found.what.split(":")[0]) == ("bad", "auth.tls.certificate")
    write_pair(tmp_path, "ingress")
    assert certificate(Auth(tls=files)).verdict == "ok"
    (tmp_path / "key.pem").write_text("half")
    assert certificate(Auth(tls=files)).verdict == "bad"


def test_the_store(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store(None).verdict == "ok"
    assert store(Batches()).verdict == "ok"
    # As it was, but for a home that nobody else may look into.
    assert list((own_home / "batches").iterdir()) == []
    assert own_home.stat().st_mode & 0o077 == 0
    (tmp_path / "file").write_text("")
    found = store(Batches(store=str(tmp_path / "file")))
    assert (found.verdict, "AWS_ACCESS_KEY_ID" in found.todo) == ("bad", True)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert store(Batches()).verdict == "warn"
    assert store(Batches(store=str(tmp_path / "shared"))).verdict == "ok"


def test_the_ledger(own_home: Path, tmp_path: Path) -> None:
    def look(**settings: Any) -> Finding:
        return ledger(Settings(models=(Model(name="m", source="/m"),), **settings))

    assert look().what == "the usage ledger is off"
    assert look(auth=Auth(enabled=True)).what == "is in batches.store"
    assert look(ledger=Ledger(enabled=True), batches=None).verdict == "ok"
    assert list((own_home / "ledger").iterdir()) == []
    (tmp_path / "file").write_text("")
    found = look(ledger=Ledger(enabled=True, store=str(tmp_path / "file")))
    assert (found.name, found.verdict) == ("ledger.store", "bad")


def test_the_database_of_keys(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert database(Auth()).what == "no API keys are asked for"
    found = database(Auth(enabled=True))
    assert (found.verdict, "by the next start" in found.what) == ("ok", True)
    # It has looked and made nothing.
    assert not list(own_home.iterdir())
    bring_up_to_date(open_database(Auth(enabled=True)))
    assert database(Auth(enabled=True)).what.endswith("keys.db answers")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        nobody = f"postgresql+psycopg://u:secret@127.0.0.1:{sock.getsockname()[1]}/keys"
        found = database(Auth(enabled=True, database=nobody))
    assert (found.verdict, "can't be used now" in found.what) == ("bad", True)
    assert "secret" not in f"{found}"
    assert database(Auth(enabled=True, database="nonsense")).verdict == "bad"
    (tmp_path / "text.db").write_text("no database at all")
    assert "not a database" in database(Auth(enabled=True, database=f"sqlite:///{tmp_path}/text.db")).what
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert database(Auth(enabled=True)).verdict == "warn"
