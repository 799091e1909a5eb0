"""Endpoint variants: path and virtual-host style, TLS, both variables; nobody there; no keys."""

import datetime
import ipaddress
import ssl
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from faults import serve_faults
from s3 import DOMAIN, environment, free_ports

from orchestrator import storage

pytestmark = pytest.mark.slow


def check(bucket):
    """Write, list, read and delete an object."""
    uri = f"{bucket}/{time.time_ns()}/x"
    storage.write_atomic(uri, b"content")
    assert [entry.name for entry in storage.list_tree(uri.rpartition("/")[0])] == ["x"]
    assert storage.read_bytes(uri) == b"content"
    assert storage.read_ranges(uri, [(1, 3)], etag=storage.etag(uri)) == [b"on"]
    storage.delete_file(uri)
    assert not storage.exists(uri)


def test_buckets_as_host_names(s3):
    bucket = s3.make_bucket("endpoints")
    with serve_faults(s3) as proxy:
        # The names reach the server through an HTTP proxy, so nobody looks them up.
        through = {"http_proxy": proxy.endpoint, "HTTP_PROXY": proxy.endpoint, "no_proxy": ""}
        style = {"AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true", "NO_PROXY": ""}
        with environment({"AWS_ENDPOINT_URL": f"http://{DOMAIN}", **through, **style}):
            check(bucket)
        assert {request.host for request in proxy.log} == {f"endpoints.{DOMAIN}"}
        assert not [r for r in proxy.log if r.key.startswith("/endpoints")]


def test_the_service_variable_wins(s3):
    bucket = s3.make_bucket("endpoints")
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    with environment({"AWS_ENDPOINT_URL": nobody, "AWS_ENDPOINT_URL_S3": s3.endpoint}):
        check(bucket)


def test_tls_with_the_users_own_authority(s3, tmp_path):
    bucket = s3.make_bucket("endpoints")
    authority, certificate, key = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serve_faults(s3, tls=context) as proxy:
        url = proxy.endpoint.replace("http://", "https://")
        with environment({"AWS_ENDPOINT_URL": url, "AWS_CA_BUNDLE": str(authority)}):
            check(bucket)
        with (
            environment({"AWS_ENDPOINT_URL": url}),
            pytest.raises(storage.StorageError, match="certificate is not trusted; set AWS_CA_BUN"),
        ):
            storage.read_bytes(f"{bucket}/x")


def make_certificate(folder):
    """Write an authority's certificate, one for 127.0.0.1 and its key; return their paths."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.datetime.now(datetime.UTC)
    names = [
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        for name in ("tests' authority", "tests' server")
    ]
    paths = [folder / name for name in ("authority.pem", "certificate.pem", "key.pem")]
    for number in range(2):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(names[number])
            .issuer_name(names[0])
            .public_key(keys[number].public_key())
            .serial_number(number + 1)
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(
                x509.BasicConstraints(ca=number == 0, path_length=None), critical=number == 0
            )
            .add_extension(here, critical=False)
            .sign(keys[0], hashes.SHA256())
        )
        paths[number].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret = keys[1].private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    paths[2].write_bytes(secret)
    return paths
