"""Settings: files, variables, refused values, and the root secret."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from pydantic import ValidationError

from pomelo.accounts.plans import BUILTIN, Plan
from pomelo.addresses import split_address
from pomelo.catalog.catalog import Catalog
from pomelo.configuration import find_plans
from pomelo.settings import ProviderSettings, Settings, SettingsError, load, variable

MIB = 1024 * 1024


def load_error(environ: dict[str, str], config: Path | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load(config, environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


def test_a_variable_overrides_the_key_of_a_file(tmp_path: Path) -> None:
    config = tmp_path / "any.toml"
    config.write_text('rest = "127.0.0.1:1"\ngrpc = ""\njson_limit = "1MiB"\nopenai_api_key = "sk-file"\n')
    settings = load(config, {"POMELO_REST": "127.0.0.1:2", "OPENAI_API_KEY": "sk-variable"})
    assert (settings.rest, settings.grpc, settings.json_limit) == ("127.0.0.1:2", "", MIB)
    assert settings.provider("openai").api_key == "sk-variable"


def test_a_provider_of_any_name_is_configured_by_file_or_variable(tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
    config.write_text('acme-2_api_key = "from the file"\nacme-2_base_url = "https://acme.example/"\n')
    environ = {"ACME_2_API_KEY": "from a variable", "OTHER_BASE_URL": "not ours", "X_API_KEY": ""}
    settings = load(config, environ)
    assert settings.provider("acme-2") == ProviderSettings(
        api_key="from a variable", base_url="https://acme.example"
    )
    assert load(config, {}).provider("acme-2").api_key == "from the file"
    assert settings.provider("x").api_key is None


def test_an_unknown_provider_is_refused_in_a_file_and_ignored_in_the_environment(tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
    config.write_text('opnai_api_key = "sk"\n')
    with pytest.raises(SettingsError, match=r"No provider is named opnai. Did you mean openai\?"):
        load(config, {}).check_providers(["openai"])
    load(None, {"OPNAI_API_KEY": "sk"}).check_providers(["openai"])


def test_the_error_for_a_wrong_base_url_has_its_name_and_not_its_value(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^OPENAI_BASE_URL: must begin with http") as caught:
        load(None, {"OPENAI_BASE_URL": "api.openai.com"}).provider("openai")
    assert "api.openai.com" not in str(caught.value)
    config = tmp_path / "p.toml"
    config.write_text('openai_base_url = "api.openai.com"\n')
    assert load_error({}, config).startswith("openai_base_url: must begin with http")


def test_delivery_origins_are_a_list_in_a_file_and_split_at_commas_in_a_variable(tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
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
    ],
)
def test_cors_origins_are_normalized_to_the_form_of_browsers(value: str, origins: tuple[str, ...]) -> None:
    assert load(None, {"POMELO_CORS_ORIGINS": value}).cors_origins == origins


def test_cors_origins_may_be_a_list_in_a_file(tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
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


def test_an_idle_timeout_is_between_one_second_and_a_day() -> None:
    assert load(None, {}).idle_timeout is None
    assert load(None, {"POMELO_IDLE_TIMEOUT": "620.5"}).idle_timeout == 620.5
    for wrong in ("0", "0.5", "-1", "nan", "inf", "86401", "a minute"):
        assert load_error({"POMELO_IDLE_TIMEOUT": wrong}).startswith("POMELO_IDLE_TIMEOUT: ")


def test_trusted_proxies_are_addresses_and_networks() -> None:
    environ = {"POMELO_TRUSTED_PROXIES": "10.0.0.0/8, 192.0.2.7,2001:db8::/32"}
    assert load(None, environ).trusted_proxies == ("10.0.0.0/8", "192.0.2.7", "2001:db8::/32")
    for wrong in ("proxy.example", "10.0.0.1/8", "10.0.0.0/40"):
        message = load_error({"POMELO_TRUSTED_PROXIES": wrong})
        assert message.startswith("POMELO_TRUSTED_PROXIES: must be an IP address or a network")


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


def test_paths_in_a_file_are_relative_to_its_folder(tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
    config.write_text('data = "here"\n')
    assert load(config, {}).data == tmp_path / "here"
    assert load(config, {"POMELO_DATA": "there"}).data == Path("there")


def test_a_named_file_must_exist_and_be_toml(tmp_path: Path) -> None:
    assert "no such file" in load_error({}, tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("rest = \n")
    assert "broken.toml" in load_error({}, broken)


def test_the_error_for_an_unknown_variable_suggests_a_similar_one() -> None:
    assert (
        load_error({"POMELO_RSET": "127.0.0.1:1"})
        == "Unknown variable POMELO_RSET. Did you mean POMELO_REST?"
    )
    assert load_error({"POMELO_ZZZZ": ""}) == "Unknown variable POMELO_ZZZZ"


def test_the_error_for_an_unknown_key_suggests_a_similar_one(tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
    config.write_text('gprc = ""\n')
    assert "unknown key 'gprc'. Did you mean grpc?" in load_error({}, config)


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
        ("POMELO_REST", "8080"),
        ("POMELO_REST", "localhost:99999"),
        ("POMELO_GRPC", "::1:80"),
        ("POMELO_STORE", "mysql://127.0.0.1"),
        ("POMELO_ARCHIVE", "/somewhere"),
        ("POMELO_WORKERS", "0"),
        ("POMELO_WORKERS", "2"),
        ("POMELO_PUBLIC_URL", "pomelo.example"),
        ("POMELO_JSON_LIMIT", "much"),
        ("POMELO_UPLOAD_LIMIT", "0"),
        ("POMELO_GRACE", "-1"),
        ("POMELO_INSECURE", "perhaps"),
        ("POMELO_TLS_CERT", "/nowhere/cert.pem"),
        ("POMELO_CATALOG", "/nowhere/catalog.toml"),
    ],
)
def test_the_error_for_a_wrong_value_is_one_line_with_the_variable(name: str, value: str) -> None:
    assert load_error({name: value}).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["POMELO_REST", "POMELO_GRPC"])
@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "pomelo.example"])
def test_a_public_address_without_tls_is_refused(name: str, host: str) -> None:
    message = load_error({name: f"{host}:8080"})
    assert name in message
    assert "POMELO_TLS_CERT" in message
    assert load(None, {name: f"{host}:8080", "POMELO_INSECURE": "1"}).insecure


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


def test_settings_and_errors_show_no_secret() -> None:
    secret, key = "s" * 40, "sk-hidden"
    shown = repr(load(None, {"POMELO_SECRET": secret, "OPENAI_API_KEY": key}))
    assert secret not in shown
    assert key not in shown
    assert "tooshort" not in load_error({"POMELO_SECRET": "tooshort"})
    with pytest.raises(ValidationError) as caught:
        Settings(secret="tooshort")
    assert "tooshort" not in str(caught.value)


def test_the_root_secret_is_created_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / "deep" / "data")
    secret = settings.root_secret()
    assert len(secret) == 64
    assert settings.root_secret() == secret == Settings(data=settings.data).root_secret()
    assert stat.S_IMODE(settings.data.stat().st_mode) == 0o700
    assert stat.S_IMODE((settings.data / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE((settings.data / "secret-check").stat().st_mode) == 0o600
    assert secret.decode() not in (settings.data / "secret-check").read_text()
    assert {path.name for path in settings.data.iterdir()} == {"secret", "secret-check"}


def test_a_folder_accepts_only_the_secret_that_it_was_first_used_with(tmp_path: Path) -> None:
    assert Settings(data=tmp_path, secret="a" * 40).root_secret() == b"a" * 40
    assert Settings(data=tmp_path, secret="a" * 40).root_secret() == b"a" * 40
    with pytest.raises(SettingsError, match="POMELO_SECRET is not the secret that the keys"):
        Settings(data=tmp_path, secret="b" * 40).root_secret()
    with pytest.raises(SettingsError, match="secret is not the secret"):
        Settings(data=tmp_path).root_secret()


def test_a_configured_secret_equals_the_secret_file_of_another_machine(tmp_path: Path) -> None:
    stored = Settings(data=tmp_path / "a").root_secret()
    configured = Settings(data=tmp_path / "b", secret=stored.decode())
    assert configured.root_secret() == stored
    assert not (tmp_path / "b" / "secret").exists()


def test_a_secret_file_that_others_can_read_or_that_is_damaged_is_refused(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    settings.root_secret()
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        settings.root_secret()
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "secret").write_text("")
    with pytest.raises(SettingsError, match="damaged"):
        settings.root_secret()


def test_a_missing_secret_file_is_not_recreated_if_there_are_keys(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    settings.database.write_bytes(b"keys")
    with pytest.raises(SettingsError, match="is missing"):
        settings.root_secret()
    assert not (tmp_path / "secret").exists()


def test_a_data_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="POMELO_DATA"):
        Settings(data=tmp_path / "file").root_secret()


def test_addresses_are_split_at_the_port() -> None:
    assert split_address("localhost:80") == ("localhost", 80)
    assert split_address("[::1]:0") == ("::1", 0)


def test_every_variable_of_the_contract_has_a_setting() -> None:
    assert {
        variable(name) for name in Settings.model_fields.keys() - {"providers", "variables", "plans"}
    } == {
        "POMELO_REST",
        "POMELO_GRPC",
        "POMELO_DATA",
        "POMELO_STORE",
        "POMELO_PUBLIC_URL",
        "POMELO_CORS_ORIGINS",
        "POMELO_SECRET",
        "POMELO_TLS_CERT",
        "POMELO_TLS_KEY",
        "POMELO_TLS_CLIENT_CA",
        "POMELO_MAX_CONNECTIONS",
        "POMELO_IDLE_TIMEOUT",
        "POMELO_INSECURE",
        "POMELO_JSON_LIMIT",
        "POMELO_UPLOAD_LIMIT",
        "POMELO_INLINE_LIMIT",
        "POMELO_MEDIA_LIMIT",
        "POMELO_MEDIA_ACCOUNT_LIMIT",
        "POMELO_DISK_RESERVE",
        "POMELO_GRACE",
        "POMELO_MAX_CALLS",
        "POMELO_CATALOG",
        "POMELO_ARCHIVE",
        "POMELO_WORKERS",
        "POMELO_DELIVERY_ORIGINS",
        "POMELO_UPSTREAM_CONNECTIONS",
        "POMELO_TRUSTED_PROXIES",
    }


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o750, 0o701])
@pytest.mark.parametrize("used", [False, True])
def test_access_of_others_to_a_data_folder_is_removed_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, used: bool
) -> None:
    data = tmp_path / "data"
    settings = Settings(data=data)
    secret = None
    if used:
        secret = settings.root_secret()
    else:
        data.mkdir()
        (data / "lost+found").mkdir()  # a new file system has this folder
    data.chmod(mode)
    caplog.clear()
    assert settings.root_secret() == secret or not used
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(data) in line
    assert f"{mode:04o}" in line
    caplog.clear()
    settings.root_secret()
    assert caplog.records == []


def test_an_open_folder_with_files_of_other_programs_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "diary").write_text("")
    tmp_path.chmod(0o755)
    with pytest.raises(SettingsError, match=f"chmod 700 {tmp_path}"):
        Settings(data=tmp_path).root_secret()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["diary"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_a_data_folder_of_another_user_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(SettingsError, match=r"another user \(uid 12345\).* chown -R 0 ") as caught:
        Settings(data=tmp_path).root_secret()
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- plans


def load_text(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "pomelo.toml"
    path.write_text(text)
    return load(path, {})


def test_a_plan_of_a_file_has_only_the_limits_that_it_sets(tmp_path: Path) -> None:
    settings = load_text(
        tmp_path,
        """
        [plans.team]
        requests_per_minute = 600
        concurrent_requests = 40
        tokens_per_minute = 1_000_000
        models = ["gpt-4", "flux-1-pro"]

        [plans.pro]
        requests_per_minute = 5
        """,
    )
    plans = find_plans(settings, Catalog.load())
    assert plans["team"] == Plan("team", 600, 40, 1_000_000, frozenset({"gpt-4", "flux-1-pro"}))
    assert plans["pro"] == Plan("pro", requests=5)
    assert plans["free"] == BUILTIN["free"]
    assert plans.keys() == BUILTIN.keys() | {"team"}


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
def test_the_error_for_a_wrong_plan_has_its_name_and_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_text(tmp_path, text)
    assert str(caught.value).startswith(message)


def test_a_plan_with_an_unknown_model_is_refused(tmp_path: Path) -> None:
    settings = load_text(tmp_path, "[plans.team]\nmodels = ['gpt-4', 'gpt-5']")
    with pytest.raises(SettingsError, match=r"plans\.team\.models: there is no model gpt-5"):
        find_plans(settings, Catalog.load())


def test_plans_have_no_variable() -> None:
    with pytest.raises(SettingsError, match="Unknown variable POMELO_PLANS"):
        load(None, {"POMELO_PLANS": "x"})


def test_the_shared_secret_is_an_existing_one_and_none_is_created(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert Settings(data=data).shared_secret() is None
    assert Settings(data=data, secret="s" * 40).shared_secret() == b"s" * 40
    assert not data.exists()
    created = Settings(data=data).root_secret()
    assert Settings(data=data).shared_secret() == created
    assert Settings(data=data, secret="s" * 40).shared_secret() == b"s" * 40


def test_a_shared_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    Settings(data=tmp_path).root_secret()
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        Settings(data=tmp_path).shared_secret()
