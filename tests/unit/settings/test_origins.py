"""Settings that are lists of origins or addresses."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomelo.settings import load
from tests.unit.settings.refusals import load_error


def test_delivery_origins_are_a_list_in_a_file_and_split_at_commas_in_a_variable(config: Path) -> None:
    config.write_text('delivery_origins = ["http://10.0.0.5:9000"]\n')
    assert load(config, {}).delivery_origins == ("http://10.0.0.5:9000",)
    environ = {"POMELO_DELIVERY_ORIGINS": "http://10.0.0.5:9000, https://files.example"}
    assert load(None, environ).delivery_origins == ("http://10.0.0.5:9000", "https://files.example")
    assert load_error({"POMELO_DELIVERY_ORIGINS": "10.0.0.5"}).startswith("POMELO_DELIVERY_ORIGINS: ")


@pytest.mark.parametrize(
    ("value", "origins"),
    [
        ("https://app.example", ("https://app.example",)),
        ("https://App.Example:443, http://LOCALHOST:3000", ("https://app.example", "http://localhost:3000")),
        ("http://[0:0::1]:80", ("http://[::1]",)),
        ("https://bücher.example", ("https://xn--bcher-kva.example",)),
        (
            "chrome-extension://abcdef,capacitor://localhost",
            ("chrome-extension://abcdef", "capacitor://localhost"),
        ),
        ("*", ("*",)),
        (" , https://app.example,", ("https://app.example",)),
    ],
)
def test_cors_origins_are_normalized_to_the_form_of_browsers(value: str, origins: tuple[str, ...]) -> None:
    assert load(None, {"POMELO_CORS_ORIGINS": value}).cors_origins == origins


def test_cors_origins_may_be_a_list_in_a_file(config: Path) -> None:
    config.write_text('cors_origins = ["https://app.example", "http://localhost:3000"]\n')
    assert load(config, {}).cors_origins == ("https://app.example", "http://localhost:3000")
    config.write_text('cors_origins = "*"\n')
    assert load(config, {}).cors_origins == ("*",)
    assert load(None, {}).cors_origins == ()


@pytest.mark.parametrize(
    "wrong",
    [
        *("https://app.example/", "https://app.example/path", "app.example", "localhost:3000", "null"),
        *("https://", "https://*.example", "https://me:pw@app.example", "https://app.example?x"),
        *("https://app.example:99999", "https://app.example#x", "https:app.example", "http://[::1"),
        *("https://a b", "https://app.example\x7f", "https://ok.example, nonsense"),
    ],
)
def test_the_error_for_a_wrong_cors_origin_describes_the_format(wrong: str) -> None:
    message = load_error({"POMELO_CORS_ORIGINS": wrong})
    assert message.startswith("POMELO_CORS_ORIGINS: must be * or origins, such as https://app.example or ")
    assert message.endswith("without a path or a slash at the end")


def test_a_star_with_other_cors_origins_is_refused() -> None:
    message = load_error({"POMELO_CORS_ORIGINS": "*, https://app.example"})
    assert message == "POMELO_CORS_ORIGINS: * allows every origin: give it alone, or leave it out"


def test_trusted_proxies_are_addresses_and_networks() -> None:
    environ = {"POMELO_TRUSTED_PROXIES": "10.0.0.0/8, 192.0.2.7,2001:db8::/32"}
    assert load(None, environ).trusted_proxies == ("10.0.0.0/8", "192.0.2.7", "2001:db8::/32")
    for wrong in ("proxy.example", "10.0.0.1/8", "10.0.0.0/40"):
        message = load_error({"POMELO_TRUSTED_PROXIES": wrong})
        assert message.startswith("POMELO_TRUSTED_PROXIES: must be an IP address or a network")
