"""Wrong rows of a catalogue are refused at start, each with file, line, key and remedy.

The same rows are tested in the operator's file, in that of a plug-in and in the built-in one, in this process and
with `pomelo serve` and `pomelo doctor`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from pomelo.catalog.catalog import CatalogError
from pomelo.catalog.toml_file import TomlFile, line_numbers
from pomelo.providers import GROUP
from pomelo.providers import registry as registry_module
from pomelo.providers.registry import read_registry
from tests.integration.commands import free_addresses, pomelo

TEXT = {
    "type": 'type = "text"',
    "limits": "limits = { max_input_tokens = 1_000, max_output_tokens = 100 }",
    "price": 'price = { million_input_tokens = "1", million_output_tokens = "2" }',
    "price_version": 'price_version = "2026-11-22"',
}
IMAGE = {
    **TEXT,
    "type": 'type = "image"',
    "limits": "limits = { max_characters = 10 }",
    "price": 'price = { image = "1" }',
}
SPEECH = {**IMAGE, "type": 'type = "text_to_speech"', "price": 'price = { thousand_characters = "1" }'}
PROVIDERS = {"text": "openai", "image": "bfl", "text_to_speech": "elevenlabs"}


def model(base: dict[str, str] = TEXT, route: str | None = "", **changed: str) -> str:
    """A valid row with some lines changed; `route` has lines of its one route. The wrong line ends in HERE."""
    lines = {**base, **changed}
    text = "[models.NAME]\n" + "".join(f"{line}\n" for line in lines.values() if line)
    if route is None:
        return text
    provider = PROVIDERS[base["type"].split('"')[1]]
    defaults = {"provider": f'provider = "{provider}"', "model": 'model = "m"'}
    unchanged = [line for key, line in defaults.items() if not re.search(rf"^{key} = ", route, re.MULTILINE)]
    return text + "[[models.NAME.routes]]\n" + "\n".join([*unchanged, route]) + "\n"


# Name -> the row, the key in it, a part of the message.
ROWS: dict[str, tuple[str, str, str]] = {
    "an unquoted date as price_version": (
        model(price_version="price_version = 2026-11-22  # HERE"),
        "price_version",
        'must be text in quotes, not the unquoted date 2026-11-22. Write, for example: price_version = "2026',
    ),
    "no price_version": (model(price_version="").replace("NAME]", "NAME]  # HERE", 1), "price_version", "Add price_version ="),
    "no price": (model(price="").replace("NAME]", "NAME]  # HERE", 1), "price", "is missing. Add price = { million_input_tokens ="),
    "a price that is not a table": (model(price='price = "4"  # HERE'), "price", "must be a table, not text. Write"),
    "a price of an unknown unit": (
        model(price='price = { banana = "4" }  # HERE'), "price", "Write, for example: price = { million_input_tokens",
    ),
    "a price of reported costs alone": (
        model(IMAGE, price='price = { provider_dollar = "1" }  # HERE'),
        "price",
        "provider_dollar needs another price beside it, by counts, which limits the cost of a task. Write",
    ),
    "a price of 0 for reported costs": (
        model(IMAGE, price='price = { image = "1", provider_dollar = "0" }  # HERE'),
        "price",
        "provider_dollar must be above 0: no task is free. Remove it to bill by counts. Write, for example",
    ),
    "a limit as text": (
        model(limits='limits = { max_input_tokens = "1000", max_output_tokens = 100 }  # HERE'),
        "limits.max_input_tokens",
        "must be a whole number, not text. Write, for example: max_input_tokens = 128_000",
    ),
    "a negative limit": (
        model(limits="limits = { max_input_tokens = -1, max_output_tokens = 100 }  # HERE"),
        "limits.max_input_tokens",
        "must be at least 1, not -1. Write",
    ),
    "a limit of 0": (model(IMAGE, limits="limits = { max_characters = 0 }  # HERE"), "limits.max_characters", "must be at least 1"),
    "a limit as a float": (
        model(limits="limits.max_input_tokens = 10\nlimits.max_output_tokens = 1.5  # HERE"),
        "limits.max_output_tokens",
        "must be a whole number, not the number 1.5. Write",
    ),
    "a limit as true": (model(IMAGE, limits="limits = { max_characters = true }  # HERE"), "limits.max_characters", "not true. Write"),
    "a limit beyond 64 bits": (
        model(IMAGE, limits="limits = { max_characters = 99_999_999_999_999_999_999 }  # HERE"),
        "limits.max_characters",
        "must be at most 2,147,483,647, not a number beyond 64 bits. Write",
    ),
    "no limits": (
        model(limits="").replace("NAME]", "NAME]  # HERE", 1),
        "limits.max_input_tokens",
        "is missing: a model of type text needs it. Add max_input_tokens = 128_000",
    ),
    "one of two limits": (
        model(limits="limits = { max_input_tokens = 10 }  # HERE"), "limits.max_output_tokens", "is missing: a model of type text",
    ),
    "a limit of another type": (
        model(IMAGE, limits="limits = { max_characters = 10, max_audio_seconds = 1 }  # HERE"),
        "limits.max_audio_seconds",
        "is not a limit of type image. Valid: max_characters",
    ),
    "a misspelt type": (
        model(SPEECH, type='type = "text-to-speech"  # HERE'), "type", "must be a task type. Did you mean text_to_speech?",
    ),
    "a type that is not text": (model(type="type = 1  # HERE"), "type", 'must be text in quotes, not 1. Write, for example: type = "text"'),
    "an unknown key": (model(limit="limit = 5  # HERE"), "limit", "is an unknown key. Did you mean limits?"),
    "no routes": (model(route=None).replace("NAME]", "NAME]  # HERE", 1), "routes", "is missing. Add [[models."),
    "routes that are not a list": (model(route=None, routes='routes = "openai"  # HERE'), "routes", "must be a list in [ ], not text"),
    "an empty list of routes": (model(route=None, routes="routes = []  # HERE"), "routes", "must be a list of at least one"),
    "a route that is not a table": (model(route=None, routes='routes = ["openai"]  # HERE'), "routes[0]", "must be a table, not text"),
    "an unknown key in a route": (
        model(route='max_token_field = "x"  # HERE'),
        "routes[0].max_token_field",
        "is an unknown key. Did you mean max_tokens_field?",
    ),
    "an option of another provider": (model(route="safety_tolerance = 2  # HERE"), "routes[0].safety_tolerance", "is an unknown key"),
    "an option of a wrong type": (
        model(route="reasoning_effort = 0  # HERE"),
        "routes[0].reasoning_effort",
        'must be text in quotes, not 0. Write, for example: reasoning_effort = "none"',
    ),
    "an option out of range": (model(IMAGE, "safety_tolerance = 7  # HERE"), "routes[0].safety_tolerance", "must be at most 6, not 7"),
    "drop as text": (model(route='drop = "seed"  # HERE'), "routes[0].drop", 'must be a list in [ ], not text. Write, for example: drop = ["seed"]'),
    "drop of an unknown parameter": (
        model(route='drop = ["temprature"]  # HERE'), "routes[0].drop", "no parameter of text is called temprature. Did you mean temperature?",
    ),
    "drop of a required field": (model(route='drop = ["messages"]  # HERE'), "routes[0].drop", "messages can't be left out of a task. Remove it"),
    "a clamp of one number": (
        model(route="clamp = { temperature = [1] }  # HERE"),
        "routes[0].clamp.temperature",
        "must be two numbers, the minimum and the maximum, and optionally a third that values must be a multiple of; "
        "not a list of 1. Write, for example: clamp = { temperature = [0, 1] }",
    ),
    "a clamp with the maximum first": (
        model(route="[models.NAME.routes.clamp]\ntemperature = [1, 0]  # HERE"),
        "routes[0].clamp.temperature",
        "must have the minimum first: 1 is more than 0. Write",
    ),
    "a clamp of text": (model(route='clamp = { temperature = ["0", "1"] }  # HERE'), "routes[0].clamp.temperature", "must be two numbers"),
    "a clamp of infinity": (model(route="clamp = { temperature = [0, inf] }  # HERE"), "routes[0].clamp.temperature", "must be two numbers"),
    "a clamp of a field that is not a number": (model(route="clamp = { stop = [0, 1] }  # HERE"), "routes[0].clamp.stop", "stop is not a number. Remove it"),
    "a clamp of a whole number by a fraction": (
        model(IMAGE, "clamp = { width = [256.5, 1440] }  # HERE"), "routes[0].clamp.width", "width is a whole number. Write whole numbers",
    ),
    "an unknown provider": (
        model(route='provider = "opnai"  # HERE'), "routes[0].provider", "no provider is called opnai. Did you mean openai?",
    ),
    "a provider of another task type": (
        model(route='provider = "bfl"  # HERE'), "routes[0].provider", "bfl has no tasks of type text. It has: image",
    ),
    "a route without a model": (
        model(route="").replace("routes]]", "routes]]  # HERE").replace('model = "m"\n', ""), "routes[0].model", "is missing. Add model =",
    ),
    "control characters in a route's model": (model(route='model = "m\\u0007"  # HERE'), "routes[0].model", "without control characters"),
    "a route's price without its version": (
        model(route='price = { million_input_tokens = "1", million_output_tokens = "1" }').replace("routes]]", "routes]]  # HERE"),
        "routes[0].price_version",
        "is missing beside price. Add price_version",
    ),
    "an invalid date": (model(retires='retires = "2026-02-30"  # HERE'), "retires", "is not a valid date: 2026-02-30. Write"),
    "a date in words": (model(retires='retires = "soon"  # HERE'), "retires", "must be a date from 2000 to 2999, such as 2026-12-31, not text"),
    "a date with a time": (model(retires="retires = 2026-12-31T00:00:00Z  # HERE"), "retires", "not a date with a time"),
    "a route's date as a number": (model(route="retires = 20261231  # HERE"), "routes[0].retires", "must be a date from 2000"),
    "an end before its announcement": (
        model(retires="retires = 2026-12-31", deprecated="deprecated = 2027-01-01  # HERE"), "deprecated", "must not be after retires. Write",
    ),
    "a model that is not a table": ("[models]\nNAME = 1  # HERE\n", "", "must be a table, not 1"),
}  # fmt: skip

# Other tables: name -> the text, the full key, a part of the message.
OTHER_ROWS = {
    "an empty name": (model().replace("NAME]", '""]').replace("NAME", '""').replace("]", "]  # HERE", 1), 'models.""', "its name must be"),
    "control characters in a name": (
        model().replace("NAME", '"a\\u001bb"').replace("]", "]  # HERE", 1), 'models."a\\u001bb"', "its name must be",
    ),
    "a name with dots without quotes": (
        model().replace("NAME", "gpt-3.5-turbo").replace("]", "]  # HERE", 1), "models.gpt-3.5-turbo", "A name with dots is written in quotes",
    ),
    "an unknown table": ("[modles.x]  # HERE\n", "modles", "is an unknown table. Did you mean models?"),
    "models that are not a table": ("models = 5  # HERE\n", "models", "must be a table, not 5"),
    "the same model twice": (model().replace("NAME", "x") + "[models.x]  # HERE\n", "", "The file is not TOML: Cannot declare"),
    "invalid TOML": ('[models.x]\ntype = "text  # HERE\n', "", "The file is not TOML"),
    "a misspelt option of a host": ('[hosts.h]\nbase_ulr = "x"  # HERE\n', "hosts.h.base_ulr", "Did you mean base_url?"),
    "an option of a host of a wrong type": ('[hosts.h]\npatient = "yes"  # HERE\n', "hosts.h.patient", "must be true or false, not text"),
    "an option of a host out of range": ("[hosts.h]\nuser_most = 0  # HERE\n", "hosts.h.user_most", "must be at least 1, not 0"),
    "a base URL without a scheme": (
        '[hosts.h]\nbase_url = "llm.example.com"  # HERE\n', "hosts.h.base_url", "must begin with http:// or https://. Write",
    ),
    "a base URL with a query": (
        '[hosts.h]\nbase_url = "https://h.example/x?api-version=1"  # HERE\n', "hosts.h.base_url", "must have no ? and no #: paths are appended",
    ),
    "an invalid header": ('[hosts.h]\nheaders = { A = "x\\ny", B = "z" }  # HERE\n', "hosts.h.headers", "that HTTP headers can have. Write"),
    "an error that no provider may raise": (
        '[hosts.h]\nmeanings = { k = "invalid_api_key" }  # HERE\n', "hosts.h.meanings.k", "must be an error that a provider may raise",
    ),
    "an unknown parameter": ('[hosts.h]\nallow = ["temprature"]  # HERE\n', "hosts.h.allow[0]", "Did you mean temperature?"),
    "credentials of an unknown provider": ('[hosts.h]\ncredentials = "tgether"  # HERE\n', "hosts.h.credentials", "Did you mean together?"),
    "a provider's name": ("[hosts.openai]  # HERE\n", "hosts.openai", "a provider has that name"),
    "a host that is not a table": ("[hosts]\nh = true  # HERE\n", "hosts.h", "must be a table, not true"),
    "a voice with an invalid id": ("[voices]\nadam = 5  # HERE\n", "voices.adam", "must be a voice's id in quotes. Write, for example: adam ="),
    "a voice twice": ('[voices]\nadam = "a"\nAdam = "b"  # HERE\n', "voices.Adam", "is listed twice"),
    "a number beyond 64 bits": ("[hosts.h]\nextra = { k = 9223372036854775808 }  # HERE\n", "hosts.h.extra.k", "is beyond 64 bits"),
}  # fmt: skip


class PlugIn:
    """A plug-in with a catalogue that a test writes."""

    catalog: Path


def load_as_operators_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_registry(path, plugins=[])


def load_as_plug_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PlugIn.catalog = path
    read_registry(plugins=[EntryPoint("plugin", f"{__name__}:PlugIn", GROUP)])


def load_as_built_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "BUILTIN_CATALOG", path)
    read_registry(plugins=[])


Loader = Callable[[Path, pytest.MonkeyPatch], None]
LOAD = pytest.mark.parametrize(
    "load", [load_as_operators_file, load_as_plug_in, load_as_built_in], ids=["own", "plug-in", "built-in"]
)
ALL_ROWS = {
    name: (text.replace("NAME", "my-model"), f"models.my-model.{key}".removesuffix("."), excerpt)
    for name, (text, key, excerpt) in ROWS.items()
} | OTHER_ROWS


def wrong_line(text: str) -> int:
    (line,) = (number for number, line in enumerate(text.splitlines(), 1) if line.endswith("# HERE"))
    return line


@LOAD
@pytest.mark.parametrize(("text", "key", "excerpt"), ALL_ROWS.values(), ids=ALL_ROWS)
def test_a_wrong_row_is_refused_with_its_file_line_key_and_remedy(
    text: str, key: str, excerpt: str, load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text("# A comment.\n\n" + text)
    with pytest.raises(CatalogError) as raised:
        load(path, monkeypatch)
    lines = str(raised.value).splitlines()
    expected = f"{path}:{wrong_line(path.read_text())}: {key + ': ' if key else ''}"
    assert any(line.startswith(expected) and excerpt in line for line in lines), lines
    assert all(line.startswith(f"{path}:") for line in lines)


@LOAD
def test_the_rows_are_valid_without_the_changes(
    load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "catalog.toml"
    models = [model(of).replace("NAME", f"m{n}") for n, of in enumerate((TEXT, IMAGE, SPEECH))]
    path.write_text("\n".join(models))
    load(path, monkeypatch)


def test_wrong_rows_of_several_files_are_reported_together(tmp_path: Path) -> None:
    own, plugged = tmp_path / "own.toml", tmp_path / "plugged.toml"
    own.write_text(model(limits="limits = {}").replace("NAME", "a"))
    plugged.write_text(model(price_version="price_version = 1").replace("NAME", "b"))
    PlugIn.catalog = plugged
    with pytest.raises(CatalogError) as raised:
        read_registry(own, plugins=[EntryPoint("plugin", f"{__name__}:PlugIn", GROUP)])
    assert {fault.file.path for fault in raised.value.faults} == {own, plugged}


def test_a_file_that_is_not_text_is_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "catalog.toml"
    path.write_bytes(b"# one\n# two \xff\n")
    with pytest.raises(CatalogError, match=r"catalog\.toml:2: The file is not UTF-8 text\. Save it as UTF-8"):
        read_registry(path, plugins=[])


def test_line_numbers_are_found_among_values_that_look_like_tables() -> None:
    text = '''# [models.no]
a = """
[models.no]
"""
b = \'\'\'
x = 1\'\'\'
[models."a.b"]  # [x]
list = [
  "]", { c = "}" }, # ]
]
d.e = 1
[[models."a.b".routes]]
f = 1979-05-27T07:32:00Z
[models."a.b".routes.clamp]
g = [0, 1]
[[models."a.b".routes]]
h = 1
'''
    lines = line_numbers(text)
    filtered = {keys: line for keys, line in lines.items() if keys[0] != "models" or len(keys) > 2}
    table = ("models", "a.b")
    assert filtered == {
        ("a",): 2,
        ("b",): 5,
        (*table, "list"): 8,
        (*table, "d"): 11,
        (*table, "d", "e"): 11,
        (*table, "routes"): 12,
        (*table, "routes", 0): 12,
        (*table, "routes", 0, "f"): 13,
        (*table, "routes", 0, "clamp"): 14,
        (*table, "routes", 0, "clamp", "g"): 15,
        (*table, "routes", 1): 16,
        (*table, "routes", 1, "h"): 17,
    }


def test_a_key_in_an_inline_value_has_the_line_of_the_value(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("\na = { b = { c = 1 } }\n")
    assert TomlFile.read(path).line(("a", "b", "c")) == 2
    assert TomlFile.read(path).line(("z",)) == 1


# --- on the command line


def catalog_environment(folder: Path, path: Path, origin: str) -> dict[str, str]:
    """The environment in which `path` is the operator's catalogue, a plug-in's or the built-in one."""
    if origin == "own":
        return {"POMELO_CATALOG": str(path)}
    site = folder / "site"
    site.mkdir(exist_ok=True)
    if origin == "built-in":
        patch = f"import pathlib, pomelo.catalog.catalog\npomelo.catalog.catalog.BUILTIN = pathlib.Path({str(path)!r})\n"
        (site / "sitecustomize.py").write_text(patch)
    else:
        info = site / "pomelo_plugin-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pomelo-plugin\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[pomelo.providers]\nplugin = pomelo_plugin:PlugIn\n")
        (site / "pomelo_plugin.py").write_text(f"class PlugIn:\n    catalog = {str(path)!r}\n")
    return {"PYTHONPATH": str(site)}


def write_wrong_rows(path: Path) -> list[tuple[str, str]]:
    """Writes a catalogue; returns how the message about each of its rows begins, and a part of it."""
    rows = [(text, key, excerpt) for text, key, excerpt in ROWS.values() if not text.startswith("[models]")]
    text, expected = "", []
    for number, (row, key, excerpt) in enumerate(rows):
        text += row.replace("NAME", f"model-{number}")
        line = wrong_line(text)
        text = text.replace("  # HERE", "")
        expected.append((f"{path}:{line}: models.model-{number}.{key}: ", excerpt))
    assert len(expected) >= 30
    path.write_text(text)
    return expected


async def test_doctor_reports_all_wrong_rows_of_a_plug_in(tmp_path: Path) -> None:
    path = tmp_path / "catalog.toml"
    expected = write_wrong_rows(path)
    result = await pomelo(tmp_path, "doctor", "--json", **catalog_environment(tmp_path, path, "plug-in"))
    (finding,) = (item for item in json.loads(result.out) if item["name"] == "plugin")
    assert (finding["state"], result.status) == ("broken", 1)
    for start, excerpt in expected:
        assert any(
            line.startswith(start) and excerpt in line for line in re.split("[;:] (?=/)", finding["detail"])
        )


@pytest.mark.parametrize("origin", ["own", "built-in"])
async def test_serve_and_doctor_report_all_wrong_rows_together(tmp_path: Path, origin: str) -> None:
    path = tmp_path / "catalog.toml"
    expected = write_wrong_rows(path)
    environment = catalog_environment(tmp_path, path, origin) | free_addresses()

    result = await pomelo(tmp_path, "serve", **environment)
    assert (result.status, result.out) == (1, "")
    reported = [line.removeprefix("pomelo: ") for line in result.error.splitlines()]
    for start, excerpt in expected:
        assert any(line.startswith(start) and excerpt in line for line in reported), start

    result = await pomelo(tmp_path, "doctor", "--json", **environment)
    assert (result.status, result.error) == (1, "")
    (finding,) = (item for item in json.loads(result.out) if item["name"] == "providers")
    assert (finding["state"], finding["detail"].splitlines()) == ("broken", reported)
    result = await pomelo(tmp_path, "doctor", **environment)
    assert all(line in result.out for line in reported)
