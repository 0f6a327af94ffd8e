"""Certificates of callers at both ingresses, over real sockets: who is let in by one, and who is not."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import grpc
import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from hycluster.auth.api_key import digest
from hycluster.auth.caller import current_caller
from hycluster.auth.certificate import certificate_digest, read_certificate
from hycluster.auth.guard import Guard
from hycluster.client import AsyncClient
from hycluster.errors import InvalidInput, Unauthenticated, Unavailable
from hycluster.ingress import tls
from hycluster.ingress.connection import protocol
from hycluster.ingress.grpc import serve_grpc
from hycluster.ingress.guarded import Guarded
from hycluster.ingress.ports import bind
from hycluster.ingress.tls import open_certificate
from hycluster.settings.auth import Auth, ClientCertificates, Tls
from hycluster.settings.ingress import Grpc, Http
from tests.auth.keyed import Keyed, keyed
from tests.ingress.stand_in import MODEL, StandInGenerator
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.timeout(120)

RANKER = "spiffe://acme/ranker"


@dataclass
class Authority:
    """Signs certificates."""

    name: str
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    @property
    def subject(self) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])

    def write(self, folder: Path, name: str, *alternatives: x509.GeneralName, lasts_s: float = 3600) -> Path:
        """``NAME.pem`` with the certificate and its key; without alternatives the authority's own."""
        folder.mkdir(exist_ok=True)
        own = not alternatives
        key = self.key if own else ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(self.subject if own else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(seconds=lasts_s))
            .add_extension(x509.BasicConstraints(ca=own, path_length=None), critical=True)
        )
        if not own:
            made = made.add_extension(x509.SubjectAlternativeName(list(alternatives)), critical=False)
        signed = made.sign(self.key, hashes.SHA256())
        file = folder / f"{name}.pem"
        plain = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + (b"" if own else plain))
        return file


def read(file: Path) -> bytes:
    return file.read_bytes()


def uri(text: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(text)


@dataclass
class Place:
    """Files of a service's certificate, of the authority of its callers', and where it listens."""

    folder: Path
    authority: Authority
    keys: Keyed
    tls: Tls
    http: str = ""
    grpc: str = ""

    def client(self, name: str, *alternatives: x509.GeneralName, of: Authority | None = None, **more: float) -> Path:
        return (of or self.authority).write(self.folder / "clients", name, *alternatives, **more)

    async def by_http(self, shown: Path | None, **headers: str) -> tuple[int, str]:
        """Status, and who it was; 0: there was no connection."""
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        if shown is not None:
            context.load_cert_chain(shown)
        async with httpx.AsyncClient(verify=context) as client:
            try:
                answer = await client.get(f"{self.http}/v1/models", headers=headers)
            except httpx.TransportError:
                return 0, ""
            return answer.status_code, answer.json().get("owner") or answer.json()["error"]["message"]

    @asynccontextmanager
    async def by_grpc(self, shown: Path | None, key: str | None = None) -> AsyncIterator[AsyncClient]:
        authorities = read(self.folder / "ca.pem")
        pair = () if shown is None else (read(shown), read(shown))
        encrypted = grpc.ssl_channel_credentials(authorities, *pair)
        async with AsyncClient(self.grpc, credentials=encrypted, api_key=key) as client:
            yield client


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(tls, "LOOK_EVERY_S", 0.02)
    servers, authority = Authority("servers"), Authority("clients")
    servers.write(tmp_path, "ca")
    own = servers.write(tmp_path, "server", x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    authority.write(tmp_path, "clients-ca")
    with keyed(tmp_path) as keys:
        clients = ClientCertificates(authority=str(tmp_path / "clients-ca.pem"))
        yield Place(tmp_path, authority, keys, Tls(certificate=str(own), key=str(own), clients=clients))


@asynccontextmanager
async def serving(place: Place, *, required: bool) -> AsyncIterator[None]:
    async def who(scope: Scope, receive: Receive, send: Send) -> None:
        caller = current_caller.get()
        await JSONResponse({"owner": f"{caller.owner}/{caller.key}" if caller else None})(scope, receive, send)

    assert place.tls.clients is not None
    clients = place.tls.clients.model_copy(update={"required": required})
    place.tls = place.tls.model_copy(update={"clients": clients})
    guard = Guard(place.keys.guard.keyring, certificates=clients)
    async with open_certificate(place.tls) as certificate:
        assert certificate is not None
        sock = bind("127.0.0.1", 0, "http.port")
        server = uvicorn.Server(
            uvicorn.Config(
                Guarded(who, guard), http=protocol(Http()), ssl_context_factory=lambda *_: certificate.context,
                log_config=None, lifespan="off",
            )
        )  # fmt: skip
        running = asyncio.create_task(server.serve(sockets=[sock]))
        ingress = await serve_grpc(StandInGenerator(), Grpc(port=0), guard=guard, certificate=certificate)
        place.http, place.grpc = f"https://127.0.0.1:{sock.getsockname()[1]}", f"127.0.0.1:{ingress.port}"
        try:
            yield
        finally:
            server.should_exit = True
            await running
            await ingress.stop(0)


async def test_a_certificate_lets_in_as_a_key_does(place: Place) -> None:
    names = {
        "by-uri": (f"URI:{RANKER}", place.client("ranker", uri("urn:other"), uri(RANKER))),
        "by-dns": ("DNS:ranker.acme", place.client("other", x509.DNSName("ranker.acme"))),
        "by-subject": ("subject:CN=third", place.client("third", x509.DNSName("unknown"))),
    }
    made = {who: place.keys.let_in(who, name) for who, (name, _) in names.items()}
    async with serving(place, required=True):
        for who, (_, shown) in names.items():
            assert await place.by_http(shown) == (200, f"acme/search/{who}")
            async with place.by_grpc(shown) as client:
                assert [card.name for card in await client.list_models()] == [MODEL]
        # It is revoked as a key is, also in a connection that is open.
        shown = names["by-uri"][1]
        async with place.by_grpc(shown) as client:
            await client.list_models()
            place.keys.revoke(made["by-uri"].id)
            with pytest.raises(Unauthenticated, match=r"certificate: is not correct"):
                await client.list_models()
        assert (await place.by_http(shown))[0] == 401
        # And a name that was taken from one may be given to another.
        place.keys.let_in("again", f"URI:{RANKER}", other=True)
        assert await place.by_http(shown) == (200, "acme/other/again")


@pytest.mark.parametrize("required", [True, False], ids=["required", "optional"])
async def test_who_is_not_let_in(place: Place, required: bool) -> None:
    place.keys.let_in("ranker", f"URI:{RANKER}")
    stranger = Authority("clients")
    unsigned = place.client("unsigned", uri(RANKER), of=stranger)
    expired = place.client("expired", uri(RANKER), lasts_s=-60)
    unknown = place.client("unknown", uri(f"{RANKER}/more"), x509.DNSName(f"URI:{RANKER}"))
    async with serving(place, required=required):
        # These two have no connection, so nobody to hear a status from.
        for shown in (unsigned, expired):
            assert (await place.by_http(shown))[0] == 0
        status, said = await place.by_http(unknown)
        assert (status, said) == (401, "certificate: is not correct: not known here, or revoked")
        status, said = await place.by_http(None)
        assert status == 401
        assert said.startswith("certificate: is missing" if required else "API key: is missing")
        if required:
            for wrong in (unsigned, expired, None):
                async with place.by_grpc(wrong, place.keys.key()) as client:
                    with pytest.raises(Unavailable):
                        await client.list_models(timeout_s=PATIENCE_S)
            async with place.by_grpc(unknown) as client:
                with pytest.raises(Unauthenticated, match=r"certificate: is not correct"):
                    await client.list_models()
        # What a certificate's digest is made of is no key.
        assert (await place.by_http(None, authorization=f"Bearer URI:{RANKER}"))[0] == 401


async def test_a_key_says_who_it_is_where_there_is_one(place: Place) -> None:
    place.keys.let_in("ranker", f"URI:{RANKER}")
    shown, unknown = place.client("ranker", uri(RANKER)), place.client("unknown", uri("urn:x"))
    bearer = {"authorization": f"Bearer {place.keys.key(other=True)}"}
    async with serving(place, required=True):
        for one in (shown, unknown):
            assert await place.by_http(one, **bearer) == (200, "acme/other/test")
        assert (await place.by_http(None, **bearer))[0] == 401
        assert (await place.by_http(shown, authorization="Bearer wrong"))[0] == 401
        async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=str(place.folder / "ca.pem"))) as probe:
            assert (await probe.get(f"{place.http}/health")).status_code == 200
        async with place.by_grpc(unknown, bearer["authorization"].removeprefix("Bearer ")) as client:
            await client.list_models()
    async with serving(place, required=False):
        assert await place.by_http(None, **bearer) == (200, "acme/other/test")
        async with place.by_grpc(None, bearer["authorization"].removeprefix("Bearer ")) as client:
            await client.list_models()
        # A browser shows a certificate unasked, also for other people's pages.
        assert (await place.by_http(shown, origin="https://elsewhere"))[0] == 401
        assert (await place.by_http(shown, origin=place.http))[0] == 200


async def test_authorities_are_replaced_under_way(place: Place) -> None:
    place.keys.let_in("ranker", f"URI:{RANKER}")
    other = Authority("others")
    before, after = place.client("before", uri(RANKER)), place.client("after", uri(RANKER), of=other)
    async with serving(place, required=True), place.by_grpc(before) as open_before:
        assert [(await place.by_http(one))[0] for one in (before, after)] == [200, 0]
        await open_before.list_models()
        # What is no authority is not taken.
        (place.folder / "clients-ca.pem").write_text("none")
        await asyncio.sleep(0.1)
        assert (await place.by_http(before))[0] == 200
        other.write(place.folder, "clients-ca")
        async with asyncio.timeout(PATIENCE_S):
            while (await place.by_http(after))[0] != 200:
                pass
        assert (await place.by_http(before))[0] == 0, "it is not only one more"
        async with place.by_grpc(after) as client:
            await client.list_models()
        async with place.by_grpc(before) as client:
            with pytest.raises(Unavailable):
                await client.list_models(timeout_s=PATIENCE_S)
        await open_before.list_models()


async def test_one_that_ends_in_an_open_connection(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.keys.let_in("ranker", f"URI:{RANKER}")
    shown = place.client("ranker", uri(RANKER))
    context = ssl.create_default_context(cafile=str(place.folder / "ca.pem"))
    context.load_cert_chain(shown)
    ends_at = read_certificate(read(shown)).expires_at
    async with (
        serving(place, required=True),
        place.by_grpc(shown) as client,
        httpx.AsyncClient(verify=context) as http,
    ):
        await client.list_models()
        assert (await http.get(f"{place.http}/v1/models")).status_code == 200
        monkeypatch.setattr("hycluster.auth.guard.time", SimpleNamespace(time=lambda: ends_at))
        assert (await http.get(f"{place.http}/v1/models")).status_code == 401
        with pytest.raises(Unauthenticated, match=r"certificate: has expired"):
            await client.list_models()


def test_names_are_kept_as_keys_are(place: Place) -> None:
    store = place.keys.store
    made = place.keys.let_in("ranker", f"URI:{RANKER}")
    assert made in store.all_keys()
    assert store.audit()[-1].detail["certificate"] == f"URI:{RANKER}"
    with pytest.raises(InvalidInput, match="stands for somebody"):
        place.keys.let_in("other", f"URI:{RANKER}")
    with pytest.raises(InvalidInput, match="is a certificate's name"):
        store.rotate_key(made.id)
    for name in ("", RANKER, "URI:", "uri:x", "DNS:a\nb", "URI:" + "x" * 255):
        with pytest.raises(InvalidInput, match=r"^certificate: .* is not allowed"):
            place.keys.let_in("other", name)
    assert certificate_digest("URI:x") not in {digest(text) for text in ("URI:x", "\xffURI:x", "\udcffURI:x")}
    with pytest.raises(Unauthenticated):
        read_certificate(b"none")


@pytest.mark.parametrize("auth", [{}, {"enabled": True, "keys": False, "oidc": []}], ids=["off", "no keys"])
def test_without_keys_nobody_knows_who_it_is(auth: dict[str, object]) -> None:
    clients = {"authority": "/ca.pem"}
    with pytest.raises(ValueError, match=r"tls.clients: is not allowed without|keys: false is not allowed"):
        Auth.model_validate({**auth, "tls": {"certificate": "/c", "key": "/k", "clients": clients}})
