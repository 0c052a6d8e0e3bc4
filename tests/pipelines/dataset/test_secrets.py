"""No secret in what is written."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.dataset.secrets import MASK, has_credentials, is_secret_name, redact

SECRET = st.text(string.ascii_letters + string.digits + "+/=_-", min_size=8, max_size=60)


@given(value=SECRET, before=st.text(max_size=40), after=st.text(max_size=40))
def test_the_value_of_a_secret_variable_is_never_left(value: str, before: str, after: str) -> None:
    assert value not in redact(f"{before}{value}{after}", {"WANDB_API_KEY": value}).replace(MASK, "")


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN", "REDIS_PASSWORD",
     "MLFLOW_TRACKING_PASSWORD", "AZURE_STORAGE_KEY", "GITHUB_PAT", "apikey"],
)  # fmt: skip
def test_secrets_are_known_by_name(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["RAY_AUTH_TOKEN_PATH", "AWS_WEB_IDENTITY_TOKEN_FILE", "NCCL_DEBUG", "TOKENIZERS_PARALLELISM",
     "GOOGLE_APPLICATION_CREDENTIALS", "KEYBOARD", "NCCL_IB_PKEY_INDEX", "AWS_REGION", "HF_HOME"],
)  # fmt: skip
def test_places_and_settings_are_no_secrets(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("s3://id:secret@bucket/x", "s3://***@bucket/x"),
        ("redis://:hunter22@host:6379", "redis://***@host:6379"),
        ("https://a.b/c.png?X-Amz-Signature=0a1b&x=1", "https://a.b/c.png?X-Amz-Signature=***&x=1"),
        ("https://a.b/c?sv=1&sig=abc%3D", "https://a.b/c?sv=1&sig=***"),
    ],
)
def test_credentials_in_urls_are_masked(text: str, masked: str) -> None:
    assert has_credentials(text)
    assert redact(text, {}) == masked


@pytest.mark.parametrize(
    "text", ["s3://bucket/a@b", "http://127.0.0.1:5000/x", "gs://bucket/x?y=1", "user@host:/path", "a: b@c"]
)
def test_plain_places_stay(text: str) -> None:
    assert not has_credentials(text)
    assert redact(text, {}) == text


def test_short_values_are_no_secrets_but_words() -> None:
    assert redact("the test passed", {"AWS_SECRET_ACCESS_KEY": "test"}) == "the test passed"
