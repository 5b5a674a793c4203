"""What an error of a storage library means: busy, forbidden, or final. No such library is imported for it."""

from __future__ import annotations

import errno
from collections.abc import Iterator

TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
TRANSIENT_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ESTALE,
    errno.ETIMEDOUT,
    getattr(errno, "EREMOTEIO", errno.EIO),
}
# Codes under a status that looks final. A multipart upload whose last acknowledgement was lost is gone.
TRANSIENT_CODES = {"NoSuchUpload", "RequestTimeout", "SlowDown", "InternalError", "OperationAborted"}
TRANSIENT_CLASSES = {
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.parsers.ResponseParserError",
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "requests.exceptions.ProxyError",
    "requests.exceptions.ChunkedEncodingError",
    "http.client.IncompleteRead",
    "google.auth.exceptions.TransportError",
    "gcsfs.retry.ChecksumError",
}
UNAUTHORISED_CLASSES = {
    "azure.core.exceptions.ClientAuthenticationError",
    "botocore.exceptions.NoCredentialsError",
    "botocore.exceptions.CredentialRetrievalError",
    "google.auth.exceptions.RefreshError",
    "google.auth.exceptions.DefaultCredentialsError",
}
UNAUTHORISED_STATUS = {401, 403}
# Expired credentials that come as something else than 401 or 403.
UNAUTHORISED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, ConnectionError | TimeoutError) or _code(error) in TRANSIENT_CODES:
        return True
    if _class_names(error) & TRANSIENT_CLASSES:
        return True
    if (status := http_status(error)) is not None:
        return status in TRANSIENT_STATUS
    return isinstance(error, OSError) and error.errno in TRANSIENT_ERRNO


def is_unauthorised(error: BaseException) -> bool:
    """Whether new credentials may help."""
    if isinstance(error, PermissionError) or http_status(error) in UNAUTHORISED_STATUS:
        return True
    # All that gcsfs leaves of a 403.
    if type(error) is OSError and str(error).startswith("Forbidden"):
        return True
    return _code(error) in UNAUTHORISED_CODES or bool(_class_names(error) & UNAUTHORISED_CLASSES)


def is_conflict(error: BaseException) -> bool:
    """Whether a conditional create failed since the key is there.

    Stores that name no condition in the answer's body reach us as a plain EINVAL, and a library's tidying up after
    the conflict may fail in turn and stand in front of it.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, FileExistsError) or http_status(seen) == 412:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def http_status(error: BaseException) -> int | None:
    """The status that a store answered with, out of an error of botocore, aiohttp, azure or gcsfs."""
    for e in _chain(error):
        response = getattr(e, "response", None)
        if isinstance(response, dict) and "HTTPStatusCode" in response.get("ResponseMetadata", {}):
            return int(response["ResponseMetadata"]["HTTPStatusCode"])
        for name in ("status_code", "status", "code"):
            if str(value := getattr(e, name, "")).isdigit():
                return int(value)
    return None


def _code(error: BaseException) -> str:
    """S3's own name for an error, out of botocore's."""
    for e in _chain(error):
        response = getattr(e, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _class_names(error: BaseException) -> set[str]:
    return {f"{c.__module__}.{c.__qualname__}" for e in _chain(error) for c in type(e).__mro__}


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__
