"""What front ends find of models, whatever service they hold."""

from __future__ import annotations

import pytest

from pomelo.call import Call
from pomelo.errors import PomeloError, model_not_found
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest, ListModelsResponse, Model
from pomelo.service import get_task_model, list_all_models
from tests.calls import call_of
from tests.unit.refusals import refused


class Models:
    """A service that lists models one a page, and knows one."""

    def __init__(self, *names: str, error: PomeloError | None = None) -> None:
        self.names = names
        self.error = error
        self.sizes: list[int] = []

    async def list_models(self, request: ListModelsRequest, call: Call) -> ListModelsResponse:
        self.sizes.append(request.page_size)
        at = int(request.page_token or 0)
        more = str(at + 1) if at + 1 < len(self.names) else ""
        return ListModelsResponse(
            models=[Model(id=one) for one in self.names[at : at + 1]], next_page_token=more
        )

    async def get_model(self, model_id: str, call: Call) -> Model:
        if self.error is not None:
            raise self.error
        return Model(id=model_id)


@pytest.mark.parametrize("names", [(), ("a",), ("a", "b", "c")])
async def test_all_pages_of_models_are_listed(names: tuple[str, ...]) -> None:
    models = Models(*names)
    assert [model.id for model in await list_all_models(models, call_of(None))] == [*names]
    assert set(models.sizes) == {1_000}


async def test_the_model_of_a_task_that_does_not_exist_is_not_supported() -> None:
    assert (await get_task_model(Models(), "a", call_of(None))).id == "a"
    with refused("unsupported_model", "model", "^Unsupported task type: gpt-9$"):
        await get_task_model(Models(error=model_not_found("gpt-9")), "gpt-9", call_of(None))
    for code in ("model_not_allowed", "store_unavailable"):
        with refused(code):
            await get_task_model(Models(error=PomeloError(code)), "a", call_of(None))
