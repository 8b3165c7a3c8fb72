"""The way to a real API server: https, its own authority, and a user's certificate."""

import base64
import ipaddress
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from rlhf_client import Client, NoConnection, connect

NOW = datetime.now(UTC)


@dataclass(frozen=True)
class Pair:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def made(name: str, by: Pair | None = None) -> Pair:
    """Of 127.0.0.1; an authority where nobody signs it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    built = (
        x509.CertificateBuilder(issuer_name=by.certificate.subject if by else subject, subject_name=subject,
            public_key=key.public_key(), serial_number=x509.random_serial_number(),
            not_valid_before=NOW - timedelta(days=1), not_valid_after=NOW + timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    )  # fmt: skip
    return Pair(built.sign(by.key if by else key, SHA256()), key)


@pytest.fixture
def authority() -> Pair:
    return made("authority")


@pytest.fixture
async def server(authority: Pair, tmp_path: Path) -> AsyncIterator[str]:
    """Tells the name of who asks, which it wants a certificate of."""
    own = made("server", authority)
    (tmp_path / "server.pem").write_bytes(own.certificate_pem + own.key_pem)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=authority.certificate_pem.decode())
    tls.load_cert_chain(tmp_path / "server.pem")
    tls.verify_mode = ssl.CERT_REQUIRED

    async def who(request: web.Request) -> web.Response:
        peer = request.transport.get_extra_info("peercert") if request.transport else {}
        return web.json_response({"who": peer["subject"][0][0][1]})

    app = web.Application()
    app.add_routes([web.get("/version", who)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    yield f"https://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def kubeconfig(folder: Path, server: str, trusted: Pair, user: Pair) -> str:
    """The authority as a file beside the kubeconfig, the user's certificate inside it."""
    (folder / "ca.crt").write_bytes(trusted.certificate_pem)
    given = {
        "client-certificate-data": base64.b64encode(user.certificate_pem).decode(),
        "client-key-data": base64.b64encode(user.key_pem).decode(),
    }
    path = folder / "config"
    path.write_text(yaml.safe_dump({
        "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": server, "certificate-authority": "ca.crt"}}],
        "users": [{"name": "u", "user": given}],
    }))  # fmt: skip
    return str(path)


async def test_a_certificate_signs_in(server: str, authority: Pair, tmp_path: Path) -> None:
    path = kubeconfig(tmp_path, server, authority, made("admin", authority))
    async with Client(connect(path)) as client:
        assert await client.read("/version") == {"who": "admin"}


async def test_another_authority_is_not_trusted(server: str, authority: Pair, tmp_path: Path) -> None:
    other = made("another authority")
    async with Client(connect(kubeconfig(tmp_path, server, other, made("admin", authority)))) as client:
        with pytest.raises(NoConnection, match=r"(?i)certificate"):
            await client.read("/version")
    async with Client(connect(kubeconfig(tmp_path, server, authority, made("admin", other)))) as client:
        with pytest.raises(NoConnection, match="does not answer"):
            await client.read("/version")
