"""What a client's certificate says of who it is. That an authority of ours has signed it was seen in the handshake.

Whom its names stand for is in the database, as a key is: in the place of a key's digest is that of one of its names. So
it is listed, limited and revoked as a key.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass

from cryptography import x509

from hycluster.errors import InvalidInput, Unauthenticated, shown

# As OpenSSL writes names, but for the subject, which is as in RFC 4514.
URI, DNS, SUBJECT = "URI:", "DNS:", "subject:"
# Of names as they are kept.
MAX_NAME = 255
_NAME = re.compile(r"(URI|DNS|subject):[^\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """A client's.

    Attributes:
        names: ``URI:...`` and ``DNS:...`` of its subject's alternative names, and ``subject:...``, in this order.
        expires_at: seconds since the epoch.
    """

    names: tuple[str, ...]
    expires_at: float


# Looked at with each request of a connection.
@functools.lru_cache(maxsize=1024)
def read_certificate(pem: bytes) -> PeerCertificate:
    """
    Raises:
        Unauthenticated: it can't be read.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = [f"{SUBJECT}{certificate.subject.rfc4514_string()}"] if list(certificate.subject) else []
        try:
            found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            pass
        else:
            uris = found.get_values_for_type(x509.UniformResourceIdentifier)
            hosts = found.get_values_for_type(x509.DNSName)
            names = [*(f"{URI}{uri}" for uri in uris), *(f"{DNS}{host}" for host in hosts), *names]
    except ValueError:
        raise Unauthenticated("certificate: can't be read") from None
    return PeerCertificate(tuple(names), certificate.not_valid_after_utc.timestamp())


def check_certificate_name(name: str) -> None:
    """
    Raises:
        InvalidInput: no certificate can have it.
    """
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise InvalidInput(
            f"certificate: {shown(name)} is not allowed; must be a name of it: 'URI:spiffe://...', 'DNS:...' or"
            f" 'subject:CN=...', of at most {MAX_NAME} characters"
        )


def certificate_digest(name: str) -> bytes:
    """What is stored and looked up for it: 32 bytes. No key has the same: what comes as a key is text, which never
    begins with this byte."""
    return hashlib.sha256(b"\xff" + name.encode("utf-8", "surrogatepass")).digest()
