"""Masks secrets in all output: values from the environment, and credentials inside URLs."""

import json
import os
import re
import sys
from collections.abc import Mapping

SECRET_NAME = re.compile(
    r"(?i)(?:^|_)(?:[a-z]*secret|[a-z]*tokens?|passw(?:or)?d|passphrase|credentials?|private|api_?key|key|pat)(?:_|$)|access_?key"
)
PATH_NAME = re.compile(
    r"(?i)_(path|file|dir|home|uri|url|mode|expiration|region|index)$|^google_application_credentials$"
)
"""Variables with these names say where a secret lies or how it is used, and contain none."""
MIN_LENGTH = 8  # a shorter value would be found in half of all texts
USER_INFO = re.compile(r"(?<=://)[^/\s:@'\"]*:[^/\s@'\"]+@")
SIGNED = re.compile(
    r"(?i)([?&](?:x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|sig|signature|token|"
    r"access_token|api_?key|password|awsaccesskeyid)=)[^&\s'\"<>]+"
)
MASK = "***"


def is_secret_name(name: str) -> bool:
    """Return whether a variable with this name is assumed to contain a secret."""
    return bool(SECRET_NAME.search(name)) and not PATH_NAME.search(name)


def has_credentials(url: str) -> bool:
    """Return whether a URL contains a password or a signature."""
    return bool(USER_INFO.search(url) or SIGNED.search(url))


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Mask every secret in a text: values of the environment's secret variables, also in JSON, and credentials in URLs.

    Args:
        text: The text to mask.
        environment: The environment; by default this process's.
    """
    held = os.environ if environment is None else environment
    values = {value for name, value in held.items() if is_secret_name(name) and len(value) >= MIN_LENGTH}
    values |= {json.dumps(value, ensure_ascii=is_ascii)[1:-1] for value in values for is_ascii in (True, False)}
    for value in sorted(values, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, MASK)
    return SIGNED.sub(rf"\1{MASK}", USER_INFO.sub(f"{MASK}@", text))


def write_line(line: str) -> None:
    """Write a line to stderr, with every secret masked."""
    sys.stderr.write(f"{redact(line)}\n")
    sys.stderr.flush()
