"""Enum values that only a newer server knows: the commands show them, and never fail at them."""

from __future__ import annotations

from typing import Any

import pytest

from pomelo.cli import models
from pomelo.cli.run import _make_task
from pomelo.cli.terminal import FailureError, mode_name, task_type_name, value_name
from pomelo.cli.usage import _record
from pomelo.gen.v1.account_service_pb2 import UsageRecord
from pomelo.gen.v1.model_service_pb2 import Model, Price, PriceUnit
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.usage_pb2 import Mode

NEW: Any = 99


def test_a_known_value_has_its_short_name_and_a_newer_one_its_number() -> None:
    assert [mode_name(mode) for mode in (Mode.MODE_TEST, Mode.MODE_LIVE, NEW)] == ["test", "live", "99"]
    assert task_type_name(TaskType.TASK_TYPE_TEXT_TO_SPEECH) == "text-to-speech"
    assert task_type_name(NEW) == "99"
    assert value_name(PriceUnit, PriceUnit.PRICE_UNIT_MILLION_INPUT_TOKENS) == "million_input_tokens"


def test_models_and_records_of_a_newer_server_are_listed() -> None:
    assert models._prices(Model(id="new", prices=[Price(unit=NEW, amount_micros=5)])) == "0.000005/99"
    record = _record(UsageRecord(task_type=NEW, mode=NEW, source=NEW))
    assert (record["type"], record["mode"], record["source"]) == ("99", "99", "99")


@pytest.mark.parametrize("task_type", [NEW, TaskType.TASK_TYPE_UNSPECIFIED])
def test_a_model_of_a_newer_type_can_not_be_run(task_type: Any) -> None:
    with pytest.raises(FailureError, match="new does tasks of a type that this command does not know"):
        _make_task(Model(id="new", task_type=task_type), "Hello", None, "adam", [], 1)
