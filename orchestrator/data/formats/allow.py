"""Which URIs a manifest may name. Pure but for resolving links on local disks.

A manifest is data from elsewhere: without this, a row could make a cluster read any file of its
machines, or the metadata service of its cloud, and pack what it finds.
"""

import dataclasses
import os

from orchestrator import storage
from orchestrator.config import UserError

SCHEMES = ("s3", "gs", "az", "file")


@dataclasses.dataclass(frozen=True)
class Allowed:
    """Prefixes below which everything may be read."""

    prefixes: tuple[str, ...]
    folder: str
    """What relative paths are relative to."""

    @classmethod
    def below(cls, prefixes: tuple[str, ...], folder: str) -> "Allowed":
        """Return the rule for the user's prefixes, or for the manifest's own folder.

        Raises:
            UserError: a prefix has another scheme.
        """
        for prefix in prefixes:
            _check_scheme(prefix, "--allow")
        return cls(tuple(_absolute(prefix) for prefix in prefixes or (folder,)), folder)

    def resolve(self, uri: str, where: str, folder: str = "") -> str:
        """Return the absolute URI that a row names.

        Args:
            uri: as written: absolute, or relative to the manifest's folder.
            where: manifest and row, for the message.
            folder: the manifest's folder, where it lies below that of the source.

        Raises:
            UserError: it may not be read.
        """
        _check_scheme(uri, where)
        absolute = "://" in uri or uri.startswith("/")
        location = _plain(uri) if absolute else storage.join(_plain(folder or self.folder), uri)
        path = location.partition("://")[2] if "://" in location else location
        climbs = ".." in path.split("/")
        if climbs or "\0" in uri or not any(_is_below(location, p) for p in self.prefixes):
            raise UserError(
                f"{where} names {_shown(uri)}, which lies outside {' and '.join(self.prefixes)}; "
                "if it may be read, add --allow PREFIX."
            )
        return location

    def check_links(self, location: str) -> bool:
        """Return whether a local file lies below a prefix once links are followed."""
        if "://" in location:
            return True
        real = os.path.realpath(location)
        return any(
            _is_below(real, os.path.realpath(prefix))
            for prefix in self.prefixes
            if "://" not in prefix
        )


def _check_scheme(uri: str, where: str) -> None:
    scheme, separator, _ = uri.partition("://")
    if separator and scheme.lower() not in SCHEMES:
        raise UserError(
            f"{where} names {_shown(uri)}, but only {', '.join(SCHEMES)} and plain paths are read, "
            "never the network at large; copy the images to a bucket first."
        )


def _shown(uri: str) -> str:
    """Return a URI without user, password and query: a signed URL is a secret."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return ascii(uri)
    host, slash, path = rest.partition("?")[0].partition("#")[0].partition("/")
    return ascii(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")


def _absolute(prefix: str) -> str:
    # Without following links: rows are compared as they are written.
    plain = _plain(prefix)
    return plain if "://" in plain else os.path.abspath(os.path.expanduser(plain))


def _plain(uri: str) -> str:
    return (uri.removeprefix("file://") if uri.startswith("file://") else uri).rstrip("/") or "/"


def _is_below(location: str, prefix: str) -> bool:
    return location.startswith(prefix if prefix.endswith("/") else f"{prefix}/")
