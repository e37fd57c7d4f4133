"""Certificates for development: an authority of one's own, and what it has signed.

They need the package `cryptography`: `pip install 'farpoint[certs]'`.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from farpoint.errors import PluginError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

DAYS: Final = 90
LOCAL: Final = ("localhost", "127.0.0.1", "::1")
_SKEW: Final = dt.timedelta(minutes=5)


@attrs.frozen
class Certificates:
    """Files in PEM format.

    Attributes:
        authority: The certificate of the authority.
        authority_key: Its key, which signs further ones.
        server: The certificate of a worker. It may also dial with it.
        server_key: Its key.
        client: The certificate of a client.
        client_key: Its key.
    """

    authority: Path
    authority_key: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path


def make_certificates(folder: Path, names: Sequence[str] = LOCAL, client: str = "client") -> Certificates:
    """Make an authority, and certificates that it has signed, valid for 90 days. Nothing is overwritten.

    Args:
        folder: Where the files go; made if it is not there.
        names: Host names and addresses that workers are dialled by.
        client: What the client is called: the identity that a policy sees.

    Raises:
        PluginError: The package `cryptography` is not installed.
        FileExistsError: There are such files already.
        OSError: They cannot be written.
        ValueError: A name cannot be in a certificate.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID
    except ModuleNotFoundError as error:
        raise PluginError(
            "certificates", "farpoint certs", "they are made with cryptography, which is not installed", fix="pip install 'farpoint[certs]'"
        ) from error

    folder.mkdir(parents=True, exist_ok=True)
    made = Certificates(*(folder / f"{who}.{kind}" for who in ("ca", "server", "client") for kind in ("pem", "key")))
    for path in attrs.astuple(made):
        if path.exists():
            raise FileExistsError(f"{path} exists, and is not overwritten: remove it, or take another folder")

    server_and_client = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _subject("farpoint development authority")

    def sign(subject: x509.Name, key: ec.EllipticCurvePrivateKey, extensions: list[tuple[x509.ExtensionType, bool]]) -> x509.Certificate:
        from cryptography.hazmat.primitives import hashes

        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateBuilder(authority, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - _SKEW).not_valid_after(now + dt.timedelta(days=DAYS))
        ours = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        theirs = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
        for extension, critical in [(ours, False), (theirs, False), *extensions]:
            builder = builder.add_extension(extension, critical)
        return builder.sign(authority_key, hashes.SHA256())

    may_sign = _usage(signs=True)
    certificate = sign(authority, authority_key, [(x509.BasicConstraints(ca=True, path_length=0), True), (may_sign, True)])
    _write(made.authority, made.authority_key, certificate, authority_key)
    for path, key_path, called, purposes in (
        (made.server, made.server_key, names, server_and_client),
        (made.client, made.client_key, [client], [ExtendedKeyUsageOID.CLIENT_AUTH]),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(signs=False), True),
            (x509.ExtendedKeyUsage(purposes), False),
            (x509.SubjectAlternativeName([_alternative(name) for name in called]), False),
        ]
        _write(path, key_path, sign(_subject(called[0]), key, extensions), key)
    return made


def _subject(name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, signs: bool) -> x509.KeyUsage:
    """Return what a key is for: to sign certificates, or to prove who one is."""
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(path: Path, key_path: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    """Write a certificate, and its key where nobody else reads it."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with os.fdopen(os.open(key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
