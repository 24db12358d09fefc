"""The catalogue holds what was promised, and takes nothing that can't be billed."""

from pathlib import Path

import pytest

from pomelo.catalog import Catalog
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.tasks import TASK_TYPES

TEXT = ["gpt-4", "gpt-4-turbo", "gpt-3.5-turbo", "claude-3-opus", "claude-3-sonnet", "claude-3-haiku"]
TEXT += ["mixtral-8x7b", "mixtral-8x22b"]
MEDIA = [
    "flux-1-pro",
    "flux-1-dev",
    "flux-1-schnell",
    "eleven-labs-tts",
    "eleven-labs-sts",
    "eleven-labs-stt",
]


def test_all_fourteen_models_are_there_with_a_kind_a_route_and_a_dated_price() -> None:
    models = Catalog.load().models
    assert sorted(TEXT + MEDIA) == list(models)
    for model in models.values():
        assert model.task_type in TASK_TYPES
        assert model.routes
        assert all(micros > 0 for micros in model.prices.values())
        assert len(model.price_version) == len("2026-11-22")


def test_prices_are_whole_microcredits() -> None:
    model = Catalog.load().resolve("flux-1-dev")
    assert dict(model.prices) == {PriceUnit.PRICE_UNIT_IMAGE: 25_000}


def test_an_unknown_model_is_told_by_its_name() -> None:
    with pytest.raises(PomeloError, match=r"^Unsupported task type: invalid-model$") as error:
        Catalog.load().resolve("invalid-model")
    assert error.value.code == "unsupported_model"
    with pytest.raises(PomeloError) as error:
        Catalog.load().resolve("x" * 10_000)
    assert len(error.value.message) < 200


ROW = """
[models.x]
type = "text"
price = {{ {price} }}
price_version = "2026-11-22"
{more}
[[models.x.routes]]
provider = "p"
model = "m"
"""


@pytest.mark.parametrize(
    ("price", "more"),
    [
        ("", ""),
        ('image = "0"', ""),
        ('image = "0.0000001"', ""),
        ('image = "-1"', ""),
        ('banana = "1"', ""),
        ('image = "x"', ""),
        ('image = "1"', "limits = { max_bananas = 1 }"),
    ],
)
def test_a_model_that_can_not_be_billed_is_refused_by_name(tmp_path: Path, price: str, more: str) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(ROW.format(price=price, more=more))
    with pytest.raises(ValueError, match="catalogue entry x"):
        Catalog.load(path)
    path.write_text(ROW.format(price='image = "0.000001"', more=""))
    assert Catalog.load(path).resolve("x").prices == {PriceUnit.PRICE_UNIT_IMAGE: 1}
