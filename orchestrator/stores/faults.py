"""What can go wrong with storage: the errors a caller sees, and what an answer of a server means.

Pure: knows HTTP statuses and error codes, but no client.
"""

from typing import Literal

from orchestrator.config import UserError

Verdict = Literal["again", "slow", "identity", "denied", "missing", "changed", "wrong"]
"""again: may pass by itself; slow: that, and too many requests caused it; identity: the credentials
are not (or no longer) known; denied: this object is refused; changed: a condition on the ETag or a
range does not hold; wrong: asking again cannot help."""

_SLOW_CODES = {"SlowDown", "ServiceUnavailable", "ThrottlingException", "TooManyRequests"}
# MinIO and AWS say 403 or 400 for the same thing, so the code decides before the status does.
_IDENTITY_CODES = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "AuthenticationFailed",
}
_OF_STATUS: dict[int, Verdict] = {
    401: "identity",
    403: "denied",
    404: "missing",
    408: "again",
    410: "missing",
    412: "changed",
    416: "changed",
    429: "slow",
    503: "slow",
}


class StorageError(UserError):
    """A URI that cannot be read or written, with the reason and the remedy in one sentence."""


class MissingError(StorageError):
    """Nothing is there (404)."""


class DeniedError(StorageError):
    """The identity may not read it (403)."""


class LockedOutError(DeniedError):
    """Nothing in the bucket can be read: the credentials or the bucket's policy are to blame."""


class ChangedError(StorageError):
    """What is there is not what was indexed: another ETag or another size."""


class OutageError(StorageError):
    """Storage did not answer for as long as the caller was willing to wait."""


class TransientError(Exception):
    """One request failed in a way that may pass; retry.Patience decides what happens next."""

    def __init__(self, reason: str, *, slow: bool = False) -> None:
        super().__init__(reason)
        self.slow = slow
        """Fewer requests would help: throttled, or nobody there at all."""


def judge(status: int | None, code: str = "") -> Verdict:
    """Return what a failed request's status and error code mean; None: no answer, or half of one.

    Nearly every other 5xx is tried again: S3 documents 500 InternalError so, and gateways
    say 502 or 504.
    """
    if status is None:
        return "again"
    # The answer to a HEAD has no body, so no code: 400 is what S3 says to an expired token.
    if code in _IDENTITY_CODES or (status == 400 and not code):
        return "identity"
    if code in _SLOW_CODES:
        return "slow"
    if code == "RequestTimeout":
        return "again"
    if status in _OF_STATUS:
        return _OF_STATUS[status]
    return "again" if status >= 500 and status not in (501, 505) else "wrong"
