"""Fetches images from http(s) URLs in a data set: bounded in time and size, never in a private network.

A data set is untrusted text. A URL in it must not reach services that only this machine can: each host is resolved
once, its addresses are checked, and the connection goes to exactly the address that was checked.
"""

import ipaddress
import socket
import time
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import urllib3

from pipelines.dataset.pair import Reason

MAX_REDIRECTS = 5
MAX_ATTEMPTS = 4
FIRST_WAIT_S = 0.5  # doubled at each attempt: 3.5 s in all
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
GONE = frozenset({404, 410})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class UrlLimits:
    """Limits on what a source may fetch."""

    timeout_s: float
    max_bytes: int
    allow_private: bool


class _Refused(Exception):
    """An answer that a retry will not change."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def fetch_url(url: str, limits: UrlLimits) -> bytes | Reason:
    """Fetch the body of a URL, or return the reason why there is none.

    Args:
        url: An http or https URL.
        limits: `timeout_s` applies to connecting and to each wait for bytes; the whole may take four times as long.
    """
    for attempt in range(MAX_ATTEMPTS):
        try:
            return _follow(url, limits)
        except _Refused as refused:
            return refused.reason
        except ValueError:  # an address that is none, given or redirected to
            return Reason.UNREACHABLE_IMAGE
        except (OSError, urllib3.exceptions.HTTPError):
            if attempt < MAX_ATTEMPTS - 1:
                time.sleep(FIRST_WAIT_S * 2**attempt)
    return Reason.UNREACHABLE_IMAGE


def _follow(url: str, limits: UrlLimits) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        found = _get(url, limits)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise _Refused(Reason.UNREACHABLE_IMAGE)


def _get(url: str, limits: UrlLimits) -> bytes | str:
    """Return the body, or the URL of a redirect."""
    parts = urlsplit(url)
    host, port = parts.hostname, parts.port
    if parts.scheme not in ("http", "https") or not host:
        raise _Refused(Reason.URL_NOT_ALLOWED)
    is_tls = parts.scheme == "https"
    port = port or (443 if is_tls else 80)
    timeout = urllib3.Timeout(connect=limits.timeout_s, read=limits.timeout_s)
    address = checked_address(host, port, limits.allow_private)
    pool: urllib3.HTTPConnectionPool
    if is_tls:
        pool = urllib3.HTTPSConnectionPool(
            address, port, timeout=timeout, server_hostname=host, assert_hostname=host, cert_reqs="CERT_REQUIRED"
        )
    else:
        pool = urllib3.HTTPConnectionPool(address, port, timeout=timeout)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    shown = f"[{host}]" if ":" in host else host
    headers = {"Host": shown if parts.port is None else f"{shown}:{port}", "User-Agent": "mapo", "Accept": "image/*"}
    with pool:
        response = pool.request("GET", path, headers=headers, redirect=False, retries=False, preload_content=False)
        try:
            return _read(response, limits)
        finally:
            response.close()


def _read(response: urllib3.BaseHTTPResponse, limits: UrlLimits) -> bytes | str:
    if response.status in REDIRECTS and "Location" in response.headers:
        return str(response.headers["Location"])
    if response.status in RETRIED:
        raise urllib3.exceptions.HTTPError(f"status {response.status}")
    if response.status in GONE:
        raise _Refused(Reason.MISSING_IMAGE)
    if response.status != 200:
        raise _Refused(Reason.UNREACHABLE_IMAGE)
    body, deadline = bytearray(), time.monotonic() + 4 * limits.timeout_s
    for block in response.stream(BLOCK_BYTES):  # raises if it is shorter than its Content-Length
        body += block
        if len(body) > limits.max_bytes:
            raise _Refused(Reason.IMAGE_TOO_LARGE)
        if time.monotonic() > deadline:
            raise TimeoutError("the body takes too long")
    return bytes(body)


def checked_address(host: str, port: int, allow_private: bool) -> str:
    """Return the address to connect to; reject a host with a private one."""
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not allow_private and not all(_is_public(address) for address in found):
        raise _Refused(Reason.URL_NOT_ALLOWED)
    return found[0]


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.split("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        found = found.ipv4_mapped or found
        # 6to4, NAT64 and the old compatible form carry an IPv4 address inside.
        if isinstance(found, ipaddress.IPv6Address) and (found.sixtofour or found in NAT64 or found in COMPATIBLE):
            return False
    return found.is_global and not found.is_multicast


NAT64 = ipaddress.ip_network("64:ff9b::/96")
COMPATIBLE = ipaddress.ip_network("::/96")
