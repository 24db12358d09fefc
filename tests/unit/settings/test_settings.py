"""Settings: files, variables, refused values, and the root secret."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from pomelo.configuration import credentials
from pomelo.providers.registry import read_registry
from pomelo.settings import ProviderSettings, Settings, SettingsError, load, variable
from tests.unit.settings.refusals import load_error

MIB = 1024 * 1024


def test_without_a_file_and_variables_the_documented_defaults_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load(None, {})
    assert (settings.rest, settings.grpc) == ("127.0.0.1:8080", "127.0.0.1:50051")
    assert settings.data == Path(".pomelo")
    assert settings.provider("openai") == ProviderSettings(api_key=None, base_url="")
    assert (settings.json_limit, settings.upload_limit, settings.inline_limit) == (8 * MIB, 50 * MIB, 4 * MIB)
    assert settings.grace == 10


@pytest.mark.parametrize(("size", "accepted"), [(23, False), (24, True), (64, True), (65, False)])
def test_an_alert_secret_has_24_to_64_bytes(size: int, accepted: bool) -> None:
    secret = "whsec_" + base64.b64encode(bytes(size)).decode()
    if accepted:
        assert load(None, {"POMELO_ALERT_SECRET": secret}).alert_secret == (secret,)
    else:
        assert load_error({"POMELO_ALERT_SECRET": secret}).startswith("POMELO_ALERT_SECRET: ")


def test_a_variable_overrides_the_key_of_a_file(config: Path) -> None:
    config.write_text('rest = "127.0.0.1:1"\ngrpc = ""\njson_limit = "1MiB"\nopenai_api_key = "sk-file"\n')
    settings = load(config, {"POMELO_REST": "127.0.0.1:2", "OPENAI_API_KEY": "sk-variable"})
    assert (settings.rest, settings.grpc, settings.json_limit) == ("127.0.0.1:2", "", MIB)
    assert settings.provider("openai").api_key == "sk-variable"


def test_the_option_for_workers_overrides_the_variable_and_the_file(config: Path) -> None:
    redis = {"POMELO_STORE": "redis://127.0.0.1"}
    config.write_text("workers = 2\n")
    assert load(config, redis).workers == 2
    assert load(config, redis | {"POMELO_WORKERS": "3"}, workers=4).workers == 4


def test_sqlite_is_a_file_of_the_data_folder_and_needs_no_archive() -> None:
    folder, archive = Path("/srv/pomelo"), "postgresql://db.example/usage"
    settings = Settings(data=folder, archive=archive)
    assert (settings.store_url(), settings.archive_url()) == (f"sqlite:{settings.database}", "")
    assert settings.database.parent == folder
    redis = Settings(data=folder, store="redis://127.0.0.1")
    assert redis.store_url() == "redis://127.0.0.1"
    assert redis.archive_url().startswith(f"sqlite:{folder}/")
    assert redis.model_copy(update={"archive": archive}).archive_url() == archive


def test_a_provider_of_any_name_is_configured_by_file_or_variable(config: Path) -> None:
    config.write_text('acme-2_api_key = "from the file"\nacme-2_base_url = "https://acme.example/"\n')
    environ = {"ACME_2_API_KEY": "from a variable", "OTHER_BASE_URL": "not ours", "X_API_KEY": ""}
    settings = load(config, environ)
    assert settings.provider("acme-2") == ProviderSettings(
        api_key="from a variable", base_url="https://acme.example"
    )
    assert load(config, {}).provider("acme-2").api_key == "from the file"
    assert settings.provider("x").api_key is None


def test_an_unknown_provider_is_refused_in_a_file_and_ignored_in_the_environment(config: Path) -> None:
    config.write_text('opnai_api_key = "sk"\n')
    with pytest.raises(SettingsError, match=r"No provider is named opnai. Did you mean openai\?"):
        load(config, {}).check_providers(["openai"])
    load(None, {"OPNAI_API_KEY": "sk"}).check_providers(["openai"])


def test_the_error_for_a_wrong_base_url_has_its_name_and_not_its_value(config: Path) -> None:
    with pytest.raises(SettingsError, match=r"^OPENAI_BASE_URL: must begin with http") as caught:
        load(None, {"OPENAI_BASE_URL": "api.openai.com"}).provider("openai")
    assert "api.openai.com" not in str(caught.value)
    config.write_text('openai_base_url = "api.openai.com"\n')
    assert load_error({}, config).startswith("openai_base_url: must begin with http")


@pytest.mark.parametrize("url", ["http://", "http://me:secret@host:port/v1", "https://me:secret@[::1/v1"])
def test_a_base_url_names_a_server(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^OPENAI_BASE_URL: must be the URL of a server") as caught:
        load(None, {"OPENAI_BASE_URL": url}).provider("openai")
    assert "secret" not in str(caught.value)


def test_a_vendors_key_has_no_line_end_and_no_characters_that_a_header_can_not_carry() -> None:
    registry = read_registry(plugins=[])
    settings = load(None, {"OPENAI_API_KEY": " sk-of-a-file\n"})
    assert credentials(settings, registry)["openai"].api_key == "sk-of-a-file"
    for key in ("sk-one\nsk-two", "sk-é", "sk-\u2028x"):
        with pytest.raises(SettingsError, match=r"^OPENAI_API_KEY has characters that no key has$"):
            credentials(load(None, {"OPENAI_API_KEY": key}), registry)


def test_an_idle_timeout_is_between_one_second_and_a_day() -> None:
    assert load(None, {}).idle_timeout is None
    assert load(None, {"POMELO_IDLE_TIMEOUT": "620.5"}).idle_timeout == 620.5
    for wrong in ("0", "0.5", "-1", "nan", "inf", "86401", "a minute"):
        assert load_error({"POMELO_IDLE_TIMEOUT": wrong}).startswith("POMELO_IDLE_TIMEOUT: ")


def test_pomelo_toml_in_the_working_directory_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pomelo.toml").write_text("grace = 3\n")
    monkeypatch.chdir(tmp_path)
    assert load(None, {}).grace == 3


def test_the_config_option_overrides_pomelo_config(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text("grace = 1\n")
    two.write_text("grace = 2\n")
    assert load(None, {"POMELO_CONFIG": str(one)}).grace == 1
    assert load(two, {"POMELO_CONFIG": str(one)}).grace == 2


def test_paths_in_a_file_are_relative_to_its_folder(config: Path) -> None:
    fields = Settings.model_fields.items()
    names = [name for name, field in fields if Path in (field.annotation, *get_args(field.annotation))]
    assert {"data", "catalog", "tls_client_ca"} < {*names}
    for name in names:
        (config.parent / f"{name}.file").touch()
    config.write_text("".join([f'{name} = "{name}.file"\n' for name in names]))
    settings = load(config, {})
    assert [getattr(settings, name) for name in names] == [config.parent / f"{name}.file" for name in names]
    config.write_text('data = "here"\n')
    assert load(config, {"POMELO_DATA": "there"}).data == Path("there")


def test_a_named_file_must_exist_and_be_toml(config: Path) -> None:
    assert "no such file" in load_error({}, config)
    config.write_text("rest = \n")
    assert "config.toml" in load_error({}, config)


def test_the_error_for_an_unknown_variable_suggests_a_similar_one() -> None:
    assert load_error({"POMELO_RSET": "x"}) == "Unknown variable POMELO_RSET. Did you mean POMELO_REST?"
    assert load_error({"POMELO_ZZZZ": ""}) == "Unknown variable POMELO_ZZZZ. Remove it, or correct its name"


def test_the_error_for_an_unknown_key_suggests_a_similar_one(config: Path) -> None:
    config.write_text('gprc = ""\n')
    assert "unknown key 'gprc'. Did you mean grpc?" in load_error({}, config)
    config.write_text('POMELO_REST = ""\n')
    assert "unknown key 'POMELO_REST'. Did you mean rest?" in load_error({}, config)
    config.write_text('[variables]\nOPENAI_API_KEY = "sk"\n')
    assert "unknown key 'variables'" in load_error({}, config)


def test_the_variables_of_the_command_line_are_accepted() -> None:
    assert load(None, {"POMELO_KEY": "pml_test_x", "POMELO_CONFIG": ""}).rest


def test_an_empty_variable_turns_a_server_off_and_counts_as_absent_otherwise() -> None:
    settings = load(None, {"POMELO_REST": "", "POMELO_GRPC": "", "POMELO_TLS_CERT": "", "POMELO_GRACE": ""})
    assert (settings.rest, settings.grpc, settings.tls_cert, settings.grace) == ("", "", None, 10)
    with pytest.raises(SettingsError):
        settings.rest_address()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            ("REST", "8080"),
            ("REST", "localhost:99999"),
            ("GRPC", "::1:80"),
            ("PUBLIC_URL", "pomelo.example"),
        ],
        *[("STORE", "mysql://127.0.0.1"), ("ARCHIVE", "/somewhere"), ("WORKERS", "0"), ("WORKERS", "2")],
        *[("JSON_LIMIT", "much"), ("UPLOAD_LIMIT", "0"), ("GRACE", "-1"), ("INSECURE", "perhaps")],
        *[("ALERT_URL", "http://hooks.example/x"), ("ALERT_URL", "hooks.example"), ("ALERT_BALANCE", "20")],
        *[
            ("ALERT_SECRET", "a" * 40),
            ("ALERT_SECRET", "whsec_abc"),
            ("ALERT_SECRET", "whsec_" + "cG9!tZWxv" * 4),
            ("ALERT_URL", "https://[/x"),
        ],
        *[
            ("ALERT_URL", "https://"),
            ("ALERT_URL", "https://hooks.example /x"),
            *[("PUBLIC_URL", f"https://a{rest}") for rest in (" b", "?x=1", "/y?", "/#z")],
        ],
        *[("MEDIA", "/srv/media"), ("MEDIA", "file:///srv"), ("MEDIA", "s3://"), ("MEDIA", "az://account")],
        *[
            ("MEDIA", "s3://key:secret@bucket"),
            ("MEDIA", "gs://bucket?x=1"),
            ("MEDIA", "https://bucket.example"),
        ],
        *[("SECRET", "\udcff" * 32), ("SECRET_PREVIOUS", "\udcff" * 32)],
        *[("STORE", "redis://:\udcff@127.0.0.1"), ("ARCHIVE", "postgresql://:\udcff@127.0.0.1/x")],
        *[("TLS_CERT", "/nowhere/cert.pem"), ("CATALOG", "/nowhere/catalog.toml"), ("ARCHIVE", "sqlite:")],
    ],
)
def test_the_error_for_a_wrong_value_is_one_line_with_the_variable(name: str, value: str) -> None:
    assert load_error({f"POMELO_{name}": value}).startswith(f"POMELO_{name}: ")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PAGE", "perhaps", "must be 1 or 0"),
        ("JSON_LIMIT", "much", "must be a number of bytes, such as 8388608 or 8MiB"),
        ("JSON_LIMIT", "8 miles", "must be a number of bytes, such as 8388608 or 8MiB"),
        *[
            (name, value, "must be a number of bytes, such as 8388608 or 8MiB")
            for name in ("UPLOAD_LIMIT", "DISK_RESERVE")
            for value in ("8,388,608", "1.5.0GiB", "10GiB # a comment", "8MiB;", "127.0.0.1:80", "\uff18MiB")
        ],
        ("JSON_LIMIT", "1GiB", "must be less than or equal to 536870912"),
        ("GRACE", "long", "must be a number"),
        ("GRACE", "-1", "must be greater than or equal to 0"),
        ("WORKERS", "two", "must be a whole number"),
        ("WORKERS", "9" * 5000, "must be a whole number with fewer digits"),
        ("TLS_KEY", f"-----BEGIN PRIVATE KEY-----\n{'a' * 300}", "can't be read: File name too long"),
        ("LOG_LEVEL", "loud", "must be 'debug', 'info', 'warning' or 'error'"),
    ],
)
def test_the_error_for_a_wrong_value_says_what_it_must_be(name: str, value: str, expected: str) -> None:
    assert load_error({f"POMELO_{name}": value}) == f"POMELO_{name}: {expected}"


def test_a_size_is_a_number_with_or_without_a_unit(config: Path) -> None:
    sizes = {"8388608": 2**23, " 8MiB ": 2**23, "8 mib": 2**23, "1.5GiB": 3 * 2**29, "1KB": 1000}
    for text, size in sizes.items():
        assert load(None, {"POMELO_UPLOAD_LIMIT": text}).upload_limit == size
    config.write_text("upload_limit = 8388608")
    assert load(config, {}).upload_limit == 2**23
    config.write_text("upload_limit = true")
    assert load_error({}, config).startswith("POMELO_UPLOAD_LIMIT: must be a number of bytes")


def test_alerts_may_have_several_receivers_and_secrets() -> None:
    urls = "https://hooks.example/a?b=c, http://127.0.0.1:9000/"
    secret = "whsec_" + "cG9tZWxv" * 4
    settings = load(None, {"POMELO_ALERT_URL": urls, "POMELO_ALERT_SECRET": f"{secret},{secret}"})
    assert settings.alert_url == ("https://hooks.example/a?b=c", "http://127.0.0.1:9000/")
    assert settings.alert_secret == (secret, secret)


@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3://bucket/a/b", "gs://bucket/", "az://account/container/a"]
)
def test_media_can_be_in_a_bucket_of_each_vendor(url: str) -> None:
    assert load(None, {"POMELO_MEDIA": url}).media == url


@pytest.mark.parametrize("name", ["POMELO_REST", "POMELO_GRPC"])
@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "pomelo.example"])
def test_a_public_address_without_tls_is_refused(name: str, host: str) -> None:
    message = load_error({name: f"{host}:8080"})
    assert name in message
    assert "POMELO_TLS_CERT" in message
    assert load(None, {name: f"{host}:8080", "POMELO_INSECURE": "1"}).insecure


def test_metrics_are_shown_to_other_machines_only_with_the_setting_for_a_network_of_your_own() -> None:
    address = {"POMELO_ADMIN": "0.0.0.0:9090"}
    assert load_error(address).startswith("POMELO_ADMIN: ")
    assert load(None, address | {"POMELO_INSECURE": "1"}).admin == "0.0.0.0:9090"
    assert load(None, {"POMELO_ADMIN": "[::1]:9090"}).admin == "[::1]:9090"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "[::1]", "localhost"])
def test_a_loopback_address_needs_no_tls(host: str) -> None:
    assert load(None, {"POMELO_REST": f"{host}:0"}).rest == f"{host}:0"


def test_a_certificate_requires_its_key(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.write_text("x")
    assert "go together" in load_error({"POMELO_TLS_CERT": str(pem)})
    assert "POMELO_TLS_CLIENT_CA needs" in load_error({"POMELO_TLS_CLIENT_CA": str(pem)})
    both = {"POMELO_TLS_CERT": str(pem), "POMELO_TLS_KEY": str(pem)}
    assert load(None, both | {"POMELO_REST": "0.0.0.0:1"}).tls_cert == pem
    assert load_error(both | {"POMELO_ADMIN": "0.0.0.0:1"}).startswith("POMELO_ADMIN: "), "it has no TLS"


def test_settings_and_errors_show_no_secret() -> None:
    secret, key = "s" * 40, "sk-hidden"
    shown = repr(load(None, {"POMELO_SECRET": secret, "OPENAI_API_KEY": key}))
    assert secret not in shown
    assert key not in shown
    assert "tooshort" not in load_error({"POMELO_SECRET": "tooshort"})
    with pytest.raises(ValidationError) as caught:
        Settings(secret="tooshort")
    assert "tooshort" not in str(caught.value)


VARIABLES = """
REST GRPC ADMIN PUBLIC_URL PAGE CORS_ORIGINS TRUSTED_PROXIES TLS_CERT TLS_KEY TLS_CLIENT_CA INSECURE
DATA STORE MEDIA ARCHIVE SECRET SECRET_PREVIOUS CATALOG WORKERS GRACE DRAIN_DELAY DELIVERY_ORIGINS
UPSTREAM_CONNECTIONS
MAX_CONNECTIONS MAX_CALLS IDLE_TIMEOUT JSON_LIMIT UPLOAD_LIMIT INLINE_LIMIT
MEDIA_LIMIT MEDIA_ACCOUNT_LIMIT DISK_RESERVE LOG_LEVEL LOG_FORMAT
ALERT_URL ALERT_SECRET ALERT_BALANCE
"""


def test_every_variable_of_the_contract_has_a_setting() -> None:
    settings = Settings.model_fields.keys() - {"providers", "variables", "plans"}
    assert {variable(name) for name in settings} == {f"POMELO_{name}" for name in VARIABLES.split()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[plans.team]\nrequests = 5", "plans.team.requests: there is no such key"),
        ("[plans.team]\nrequests_per_minute = 0", "plans.team.requests_per_minute: "),
        ("[plans.team]\nrequests_per_minute = '5'", "plans.team.requests_per_minute: "),
        ("[plans.team]\nconcurrent_requests = true", "plans.team.concurrent_requests: "),
        ("[plans.team]\ntokens_per_minute = 1.5", "plans.team.tokens_per_minute: "),
        ("[plans.team]\nmodels = []", "plans.team.models: "),
        ("[plans.team]\nmodels = [3]", "plans.team.models.0: "),
        ("[plans.'my team']", "plans.my team: a name has"),
        ("[plans]\nteam = 3", "plans.team: "),
        ("plans = 3", "plans: "),
    ],
)
def test_the_error_for_a_wrong_plan_has_its_name_and_field(config: Path, text: str, message: str) -> None:
    config.write_text(text)
    assert load_error({}, config).startswith(message)


def test_plans_have_no_variable() -> None:
    with pytest.raises(SettingsError, match="Unknown variable POMELO_PLANS"):
        load(None, {"POMELO_PLANS": "x"})


def test_previous_secrets_are_checked_as_the_secret_is(config: Path) -> None:
    settings = load(None, {"POMELO_SECRET_PREVIOUS": f"{'a' * 32}, {'b' * 32}"})
    assert settings.previous_secrets() == (b"a" * 32, b"b" * 32)
    assert "a" * 32 not in repr(settings)
    assert "32 characters" in load_error({"POMELO_SECRET_PREVIOUS": f"{'a' * 32},{'b' * 31}"})
    config.write_text(f'secret_previous = ["{"a" * 32}"]')
    assert load(config, {}).previous_secrets() == (b"a" * 32,)
