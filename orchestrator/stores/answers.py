"""What a failed request of obstore means, and the sentence a person gets for it."""

import re

from obstore.exceptions import PreconditionError, UnauthenticatedError

from orchestrator.stores import faults
from orchestrator.stores.faults import StorageError

_UNTRUSTED = "the server's certificate is not trusted"
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_KIND = re.compile(r"kind: (Connect|Timeout|Interrupted|Decode|Request)\b")
_KINDS = {
    "Connect": "no connection",
    "Timeout": "no byte in time",
    "Interrupted": "the connection broke",
    "Decode": "the body broke off",
    "Request": "the connection broke",
}


def read_error(error: Exception) -> tuple[faults.Verdict, str]:
    """Return what a client's exception means, and a short reason without keys or signatures."""
    text = str(error)
    status, code, kind = (pattern.search(text) for pattern in (_STATUS, _CODE, _KIND))
    if status is not None:
        number, name = int(status[1]), code[1] if code else ""
        return faults.judge(number, name), f"{number} {name}".rstrip()
    if isinstance(error, FileNotFoundError):
        return "missing", "404"
    if isinstance(error, UnauthenticatedError):
        return "identity", "the credentials cannot be had"
    if isinstance(error, PreconditionError):
        return "changed", "412"
    if "InvalidCertificate" in text:
        return "wrong", _UNTRUSTED
    # Nobody there at all: asking less often is as polite as after a 503.
    verdict: faults.Verdict = "slow" if kind is not None and kind[1] == "Connect" else "again"
    return verdict, _KINDS[kind[1]] if kind else "half an answer"


def fault(uri: str, verdict: faults.Verdict, reason: str, verb: str) -> StorageError:
    """Return the error for an object that is gone, was changed, or cannot be asked for."""
    if verdict == "missing":
        return faults.MissingError(
            f"cannot {verb} {uri}: there is no such bucket or key; check the spelling (keys are "
            "case-sensitive)."
        )
    if verdict == "changed":
        return faults.ChangedError(
            f"{uri} is not the object that was indexed ({reason}); restore it or pack again."
        )
    if reason == _UNTRUSTED:
        return StorageError(f"cannot {verb} {uri}: {reason}; set AWS_CA_BUNDLE to its authority's.")
    remedy = "set AWS_REGION to the bucket's" if reason[:3] in ("301", "400") else "check the URI"
    return StorageError(f"cannot {verb} {uri}: {reason}; {remedy}.")


def denied(uri: str, reason: str, verb: str, *, everything: bool) -> StorageError:
    """Return the error for a 403: of one object, or of all that a bucket holds."""
    start = f"cannot {verb} {uri}: "
    if everything:
        return faults.LockedOutError(
            f"{start}the bucket refuses everything ({reason}), so the credentials are wrong or "
            "lack the right; check the credentials or bucket policy."
        )
    return faults.DeniedError(
        f"{start}the credentials are wrong or lack the right ({reason}); check them and the "
        "bucket's policy."
    )
