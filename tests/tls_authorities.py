"""Certificates with every defect that a test of checks needs."""

from __future__ import annotations

import ipaddress
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID as Purpose, NameOID

SERVER, CLIENT = Purpose.SERVER_AUTH, Purpose.CLIENT_AUTH
DAY = timedelta(days=1)


@dataclass(frozen=True)
class Certified:
    """A certificate and its key, and what leads from it to the root, which is not sent."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    above: tuple[x509.Certificate, ...] = ()

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def configure(self, context: ssl.SSLContext, *, alone: bool = False) -> None:
        """:param alone: without those between"""
        chain = [self.certificate] if alone else [self.certificate, *self.above]
        key = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with tempfile.NamedTemporaryFile() as file:
            file.write(key + b"".join(link.public_bytes(Encoding.PEM) for link in chain))
            file.flush()
            context.load_cert_chain(file.name)


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative(name: str) -> x509.GeneralName:
    """Of "dns:127.0.0.1" a DNS name, whatever it looks like."""
    if name.startswith("dns:"):
        return x509.DNSName(name.removeprefix("dns:"))
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def issue(
    issuer: Certified | None,
    *names: str,
    common_name: str = "someone",
    purposes: Sequence[Any] = (SERVER, CLIENT),
    valid: tuple[timedelta, timedelta] = (-DAY, DAY),
    authority: bool = False,
    path_length: int | None = None,
    identified: bool = True,
) -> Certified:
    """A certificate.

    :param issuer: ``None``: itself
    :param valid: from when until when, from now on
    :param authority: whether it may issue others
    :param path_length: how many authorities may follow
    :param identified: whether it names its issuer's key
    """
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    subject = _subject(common_name)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + valid[0])
        .not_valid_after(now + valid[1])
        .add_extension(x509.BasicConstraints(authority, path_length), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if names:
        alternatives = x509.SubjectAlternativeName([_alternative(name) for name in names])
        builder = builder.add_extension(alternatives, critical=False)
    if purposes and not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if authority:
        usage = dict.fromkeys(
            (
                "digital_signature",
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        builder = builder.add_extension(
            x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True
        )
    if identified:
        signer = key if issuer is None else issuer.key
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        builder = builder.add_extension(identifier, critical=False)
    certificate = builder.sign(key if issuer is None else issuer.key, SHA256())
    above = () if issuer is None or not _is_between(issuer) else (issuer.certificate, *issuer.above)
    return Certified(certificate, key, above)


def _is_between(issuer: Certified) -> bool:
    return issuer.certificate.issuer != issuer.certificate.subject


def root(common_name: str = "root") -> Certified:
    return issue(None, common_name=common_name, authority=True)
