"""Whose a request is by its key or header, and until when it must be answered."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.datastructures import Headers

from paceline.errors import ConfigError
from paceline.server.errors import ApiError
from paceline.server.guard import keys_of
from paceline.server.tenants import MOST_CHARACTERS, NOBODY, TenantNames, deadline_of, weights_of

ONE, TWO, THREE = "sk-number-one", "sk-number-two", "sk-number-three"


def bearer(key: str, **more: str) -> Headers:
    return Headers({"authorization": f"Bearer {key}", **{name.replace("_", "-"): text for name, text in more.items()}})


def test_without_keys_the_header_says_it() -> None:
    tenants = TenantNames([], {"a": 3.0})
    assert tenants.of(Headers({})) == NOBODY
    assert tenants.of(Headers({"x-tenant": "  "})) == NOBODY
    one = tenants.of(Headers({"x-tenant": " a "}))
    assert one.weight == 3.0
    assert one == tenants.of(Headers({"x-tenant": "a"}))
    assert one.identity != tenants.of(Headers({"x-tenant": "b"})).identity


def test_with_several_keys_each_is_a_tenant_and_the_header_says_nothing() -> None:
    tenants = TenantNames(keys_of("--api-key", f"{ONE},{TWO}", None), {})
    first, second = tenants.of(bearer(ONE, x_tenant="x")), tenants.of(bearer(TWO, x_tenant="x"))
    assert first.identity != second.identity
    assert tenants.of(Headers({"x-api-key": TWO})) == second


def test_keys_of_one_name_are_one_tenant_and_have_its_weight(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who\n{ONE} team a\n{TWO}   team a\n{THREE} b\n")
    tenants = TenantNames(keys_of("--api-key", None, str(file)), weights_of("team a=2, b=0.5"))
    assert tenants.of(bearer(ONE)) == tenants.of(bearer(TWO))
    assert (tenants.of(bearer(ONE)).weight, tenants.of(bearer(THREE)).weight) == (2.0, 0.5)


def test_one_key_is_a_gateways_and_its_header_is_believed() -> None:
    tenants = TenantNames(keys_of("--api-key", ONE, None), {})
    assert tenants.of(bearer(ONE)) == NOBODY
    assert tenants.of(bearer(ONE, x_tenant="a")) != NOBODY


def test_a_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(ApiError, match="X-Tenant: has at most 128 characters"):
        TenantNames([], {}).of(Headers({"x-tenant": "a" * (MOST_CHARACTERS + 1)}))


@pytest.mark.parametrize("text", ["a", "a=", "a=x", "a=0", "a=-1", "=2", "a=nan", "a=inf", "a=1,b"])
def test_weights_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--tenant-weight: .* is not NAME=WEIGHT"):
        weights_of(text)


def test_a_deadline_counts_from_when_the_request_came() -> None:
    assert deadline_of(Headers({}), 10.0) == float("inf")
    assert deadline_of(Headers({"x-request-deadline-ms": " 250 "}), 10.0) == 10.25


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "x", "²", "999999999", "86400001"])
def test_a_deadline_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ApiError, match=r"X-Request-Deadline-Ms: .* is no number of milliseconds"):
        deadline_of(Headers({"x-request-deadline-ms": text}), 0.0)
