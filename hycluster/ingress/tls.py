"""TLS at both ingresses, by a certificate in files that may be replaced while they are in use."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
from cryptography import x509

from hycluster.errors import SettingsError, one_line
from hycluster.observe.ingresses import certificate_taken
from hycluster.replica.sparing_log import SparingLog
from hycluster.settings.auth import Tls

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with those that vouch for it, and its key, as their files had them.

    Attributes:
        authority: those that vouch for callers' certificates; empty where they are not asked for any.
    """

    chain: bytes
    key: bytes
    authority: bytes = b""

    @property
    def expires_at(self) -> float:
        """The first certificate's end, which is the ingress' own."""
        return x509.load_pem_x509_certificate(self.chain).not_valid_after_utc.timestamp()


class Certificate:
    """What both ingresses show their callers. A pair of files that do not belong together, as while they are being
    replaced, is not taken: what was taken before goes on.

    Raises:
        SettingsError: there is no such pair to begin with.
    """

    def __init__(self, settings: Tls) -> None:
        self._settings = settings
        # It is tried again each second.
        self._not_taken = SparingLog(logger, logging.WARNING)
        # Of the HTTP ingress. A pair that is loaded into it is that of all handshakes from then on.
        self.context = _context()
        self._pair = check_files(settings)
        _load(self.context, self._pair)
        self._begin_verifying(self._pair)
        certificate_taken(self._pair.expires_at)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Of the gRPC ingress; asks for the pair at each handshake."""
        clients = self._settings.clients
        # It asks all or nobody, and hears of nobody whom it did not ask.
        required = clients is not None and clients.required
        return grpc.dynamic_ssl_server_credentials(self._grpc_pair(), self._grpc_pair, required)

    def look(self) -> Pair | None:
        """What is in the files, if that has changed and is a pair. Never raises."""
        try:
            found = _read(self._settings)
            if found == self._pair:
                return None
            _load(_context(), found)
        except (OSError, ValueError) as error:
            self._refuse(error)
            return None
        return found

    def take(self, pair: Pair) -> None:
        """Show it from now on. In the event loop: between its two halves a handshake of another thread's would find
        none. Never raises."""
        try:
            self._begin_verifying(pair)
            _load(self.context, pair)
            certificate_taken(pair.expires_at)
        except (OSError, ValueError) as error:
            self._refuse(error)
            return
        self._pair = pair
        logger.warning("auth.tls: %s is taken from now on", self._settings.certificate)

    def _refuse(self, error: Exception) -> None:
        self._not_taken.write("auth.tls: the files can't be taken, the ones before go on: %s", _said(error))

    def _begin_verifying(self, pair: Pair) -> None:
        """Have callers' certificates be signed by the pair's authority alone: one that a context has heard of it does
        not forget, so that each handshake goes on with a context that knows no other."""
        if not pair.authority:
            return
        verifying = _context()
        _load(verifying, pair)

        def go_on(handshake: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            handshake.context = verifying

        self.context.sni_callback = go_on

    def _grpc_pair(self) -> grpc.ServerCertificateConfiguration:
        pair = self._pair
        return grpc.ssl_server_certificate_configuration([(pair.key, pair.chain)], pair.authority or None)


def check_files(settings: Tls) -> Pair:
    """What is in the files, for whoever can begin with it.

    Raises:
        SettingsError: there is no such pair; names the setting and the file that is at fault.
    """
    try:
        pair = _read(settings)
    except OSError as error:
        raise SettingsError(_said(error)) from None
    where = f"auth.tls: {settings.certificate} with {settings.key}: must be a pair in PEM, the key without a password"
    try:
        _load(_context(), replace(pair, authority=b""))
        # Read by another library than OpenSSL.
        _ = pair.expires_at
        if settings.clients is not None:
            where = f"auth.tls.clients.authority: {settings.clients.authority}: must be PEM"
            _load(_context(), pair)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{where}: {_said(error)}") from None
    return pair


def _read(settings: Tls) -> Pair:
    """
    Raises:
        OSError: names the setting.
    """
    clients = settings.clients
    authority = b"" if clients is None else _bytes("auth.tls.clients.authority", clients.authority)
    return Pair(_bytes("auth.tls.certificate", settings.certificate), _bytes("auth.tls.key", settings.key), authority)


def _bytes(field: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise OSError(f"{field}: {file} can't be read: {error.strerror}") from None


@contextlib.asynccontextmanager
async def open_certificate(settings: Tls | None) -> AsyncIterator[Certificate | None]:
    """The certificate of these settings, followed; None where nothing is encrypted.

    Raises:
        SettingsError: there is no such certificate.
    """
    if settings is None:
        yield None
        return
    certificate = Certificate(settings)

    async def follow() -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if (pair := await asyncio.to_thread(certificate.look)) is not None:
                certificate.take(pair)

    following = asyncio.create_task(follow())
    try:
        yield certificate
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _load(context: ssl.SSLContext, pair: Pair) -> None:
    """Both as they were read at one moment; OpenSSL reads files alone."""
    with tempfile.TemporaryDirectory(prefix="hycluster-tls") as folder:
        chain, key = Path(folder) / "chain", Path(folder) / "key"
        chain.write_bytes(pair.chain)
        key.write_bytes(pair.key)
        # Without a password, it would ask for one at the terminal.
        context.load_cert_chain(chain, key, password="")
    if pair.authority:
        context.load_verify_locations(cadata=pair.authority.decode("ascii"))
        # Who shows none may have a key. In TLS 1.3 a certificate is not seen on its way, and without tickets each
        # connection shows it anew.
        context.verify_mode = ssl.CERT_OPTIONAL
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0


def _said(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or error, 200)
