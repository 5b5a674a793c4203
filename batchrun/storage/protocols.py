"""Whether the library that a URL needs is there, told before anything heavy is imported."""

from __future__ import annotations

from importlib.util import find_spec

import fsspec
from fsspec.registry import get_filesystem_class, known_implementations, registry

from batchrun.errors import Refused, nearest

COMMON = ("s3", "gs", "abfs", "hf", "http", "https", "file")


def refuse_unknown(url: str, refusal: type[Refused]) -> None:
    """Looks at every protocol of a path or URL, chained ones included.

    Raises:
        Refused: as `refusal`: no such protocol, or the package that serves it is not installed.
    """
    for link in url.split("::") if "::" in url else [url]:
        protocol, found, _ = link.partition("://")
        if found or "::" in url:
            _refuse(protocol, url, refusal)


def _refuse(protocol: str, url: str, refusal: type[Refused]) -> None:
    if protocol in registry:
        return
    if protocol not in known_implementations:
        hint = nearest(protocol, COMMON)
        raise refusal(
            f"no protocol {protocol}://{hint}", url, "correct the URL, or install its fsspec package"
        )
    package = str(known_implementations[protocol]["class"]).partition(".")[0]
    if package != fsspec.__name__:
        if find_spec(package) is None:
            raise _missing(package, protocol, url, refusal)
        return
    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        cause = error.__cause__
        package = (cause.name if isinstance(cause, ImportError) else None) or error.name or protocol
        raise _missing(package.partition(".")[0], protocol, url, refusal) from None


def _missing(package: str, protocol: str, url: str, refusal: type[Refused]) -> Refused:
    return refusal(f"{protocol}:// needs the package {package}", url, f"pip install {package}")
