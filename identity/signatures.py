"""Signatures of bundles: Ed25519 (RFC 8032) over a prefix and the bundle's digest.

The digest is the SHA-256 of the manifest, which names the digests of graph and weights: one
signature covers everything that a device runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from identity.errors import UntrustedError
from identity.files import SIGNER_FILE, SIGNER_KEY_FILE, read
from wire_protocol.errors import IdentityError
from wire_protocol.tls import check_private

# What the key signs cannot be taken for anything else.
_PREFIX: Final = b"musplit bundle 1\0"


def new_signer() -> tuple[bytes, bytes]:
    """A new pair: the private key and the public one, PEM."""
    key = Ed25519PrivateKey.generate()
    return (
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    )


def sign_bundle(folder: Path, digest: str) -> bytes:
    """The signature (64 bytes) of a bundle's digest by the key in a server's identity folder.

    Raises IdentityError.
    """
    path = folder / SIGNER_KEY_FILE
    remedy = "give the server the identity that `musplit ca` made for its fleet"
    data = read(path, remedy)
    check_private(path)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"{path}: no private key ({error}); {remedy}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(f"{path}: no Ed25519 key; {remedy}")
    return key.sign(_PREFIX + bytes.fromhex(digest))


def check_bundle(folder: Path, digest: str, signature: bytes) -> None:
    """Return when the lab's signer, whose key lies in `folder`, signed the bundle of this digest.

    Raises UntrustedError, or IdentityError without a usable key.
    """
    path = folder / SIGNER_FILE
    remedy = "copy the lab's signer.pub there, or enrol anew"
    data = read(path, remedy)
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"{path}: no public key; {remedy}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise IdentityError(f"{path}: no Ed25519 key; {remedy}")
    if not signature:
        raise UntrustedError(
            f"bundle {digest[:12]} is not signed: nothing of it is run; start the server with "
            "--identity, the folder that holds signer.key"
        )
    try:
        key.verify(signature, _PREFIX + bytes.fromhex(digest))
    except InvalidSignature as error:
        raise UntrustedError(
            f"bundle {digest[:12]} was altered, or signed by another key than {path}: nothing of "
            "it is run; is this the lab's server, and signer.pub the lab's?"
        ) from error
