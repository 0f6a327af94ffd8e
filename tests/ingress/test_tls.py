"""TLS at both ingresses, and certificates that are replaced under way."""

from __future__ import annotations

import asyncio
import datetime as dt
import errno
import ipaddress
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from prometheus_client import REGISTRY
from starlette.responses import JSONResponse

from hycluster.client import AUTHORITIES_VARIABLE, AsyncClient
from hycluster.errors import SettingsError, Unavailable
from hycluster.ingress import tls
from hycluster.ingress.connection import protocol
from hycluster.ingress.grpc import serve_grpc
from hycluster.ingress.ports import bind
from hycluster.ingress.tls import Certificate, open_certificate
from hycluster.observe.ingresses import certificate_taken
from hycluster.settings.auth import ClientCertificates, Tls
from hycluster.settings.ingress import Grpc, Http
from tests.ingress.stand_in import MODEL, StandInGenerator
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.timeout(120)


def write_pair(folder: Path, name: str) -> None:
    """``cert.pem``, which vouches for itself, and ``key.pem``, for this machine."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    local = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(local, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pair(tmp_path, "first")
    return tmp_path


@pytest.fixture
def settings(folder: Path) -> Tls:
    return Tls(certificate=str(folder / "cert.pem"), key=str(folder / "key.pem"))


@asynccontextmanager
async def http_server(certificate: Certificate) -> AsyncIterator[str]:
    sock = bind("127.0.0.1", 0, "http.port")
    server = uvicorn.Server(
        uvicorn.Config(
            JSONResponse({"said": "x" * 100_000}),
            http=protocol(Http()),
            ssl_context_factory=lambda *_: certificate.context,
            log_config=None,
            lifespan="off",
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield f"https://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


async def by_http(url: str, authorities: Path) -> bool:
    """Whether a new connection trusts it."""
    context = ssl.create_default_context(cafile=str(authorities))
    async with httpx.AsyncClient(verify=context) as client:
        try:
            return len((await client.get(url)).json()["said"]) == 100_000
        except httpx.ConnectError:
            return False


async def by_grpc(target: str) -> bool:
    async with AsyncClient(target) as client:
        try:
            return bool(await client.list_models(timeout_s=PATIENCE_S))
        except Unavailable:
            return False


async def test_both_are_encrypted_and_a_new_certificate_is_taken(
    settings: Tls, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "LOOK_EVERY_S", 0.02)
    first, second = folder / "first.pem", folder / "second.pem"
    first.write_bytes((folder / "cert.pem").read_bytes())
    async with open_certificate(settings) as certificate:
        assert certificate is not None
        grpc = await serve_grpc(StandInGenerator(), Grpc(port=0), certificate=certificate)
        target = f"127.0.0.1:{grpc.port}"
        async with http_server(certificate) as url:
            assert not await by_grpc(target)
            monkeypatch.setenv(AUTHORITIES_VARIABLE, str(first))
            assert await by_http(url, first)
            assert await by_grpc(target)
            async with httpx.AsyncClient() as plain:
                with pytest.raises(httpx.RemoteProtocolError):
                    await plain.get(url.replace("https", "http"))
            # One that is open goes on.
            async with (
                AsyncClient(target) as old,
                httpx.AsyncClient(verify=ssl.create_default_context(cafile=str(first))) as old_http,
            ):
                await old.list_models()
                await old_http.get(url)
                write_pair(folder, "second")
                second.write_bytes((folder / "cert.pem").read_bytes())
                while not await by_http(url, second):
                    pass
                assert not await by_http(url, first)
                assert not await by_grpc(target)
                monkeypatch.setenv(AUTHORITIES_VARIABLE, str(second))
                assert await by_grpc(target)
                assert [card.name for card in await old.list_models()] == [MODEL]
                assert (await old_http.get(url)).status_code == 200
        await grpc.stop(0)


async def test_halves_are_not_taken(settings: Tls, folder: Path) -> None:
    certificate = Certificate(settings)
    first = folder / "first.pem"
    first.write_bytes((folder / "cert.pem").read_bytes())
    async with http_server(certificate) as url:
        for name, content in (("key.pem", b"half"), ("cert.pem", b"")):
            kept = (folder / name).read_bytes()
            (folder / name).write_bytes(content)
            assert certificate.look() is None
            assert await by_http(url, first)
            (folder / name).unlink()
            assert certificate.look() is None
            assert await by_http(url, first)
            (folder / name).write_bytes(kept)
        other = folder / "other"
        other.mkdir()
        write_pair(other, "other")
        (folder / "key.pem").write_bytes((other / "key.pem").read_bytes())
        assert certificate.look() is None
        assert await by_http(url, first)


async def test_there_must_be_one_to_begin_with(settings: Tls, folder: Path) -> None:
    async def refused() -> str:
        with pytest.raises(SettingsError) as error:
            async with open_certificate(settings):
                pass
        return error.value.message

    whole = (folder / "key.pem").read_bytes()
    (folder / "key.pem").write_bytes(b"half")
    assert re.match(r"auth\.tls: .*cert\.pem with .*key\.pem: ", await refused())
    (folder / "key.pem").unlink()
    assert await refused() == f"auth.tls.key: {folder / 'key.pem'} can't be read: No such file or directory"
    # Whose file it is that is missing, and not the others.
    (folder / "key.pem").write_bytes(whole)
    authority = folder / "ca.pem"
    settings = settings.model_copy(update={"clients": ClientCertificates(authority=str(authority))})
    assert await refused() == f"auth.tls.clients.authority: {authority} can't be read: No such file or directory"
    authority.write_bytes(b"none")
    assert (await refused()).startswith(f"auth.tls.clients.authority: {authority}: must be PEM: ")
    async with open_certificate(None) as none:
        assert none is None


def test_paths_are_the_same_for_every_process() -> None:
    with pytest.raises(ValueError, match="certificate"):
        Tls(certificate="cert.pem", key="/key.pem")


async def test_one_that_can_not_be_taken_now_is_taken_later(
    settings: Tls, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when it is, say."""
    monkeypatch.setattr(tls, "LOOK_EVERY_S", 0.02)
    load, failed = tls._load, 0
    async with open_certificate(settings) as certificate:
        assert certificate is not None

        def full(context: ssl.SSLContext, pair: tls.Pair) -> None:
            nonlocal failed
            if context is certificate.context and not failed:
                failed += 1
                raise OSError(errno.ENOSPC, "No space left on device")
            load(context, pair)

        monkeypatch.setattr(tls, "_load", full)
        write_pair(folder, "second")
        second = folder / "cert.pem"
        async with http_server(certificate) as url:
            async with asyncio.timeout(PATIENCE_S):
                while not await by_http(url, second):
                    pass
    assert failed == 1


def test_its_end_is_told(tmp_path: Path) -> None:
    def told() -> float | None:
        return REGISTRY.get_sample_value("hycluster_certificate_expires_timestamp_seconds")

    write_pair(tmp_path, "one")
    certificate = Certificate(Tls(certificate=f"{tmp_path}/cert.pem", key=f"{tmp_path}/key.pem"))
    try:
        assert told() == pytest.approx(dt.datetime.now(dt.UTC).timestamp() + 86400, abs=300)
        before = told()
        (tmp_path / "cert.pem").write_text("no certificate")
        assert certificate.look() is None
        assert told() == before
    finally:
        certificate_taken(0)
