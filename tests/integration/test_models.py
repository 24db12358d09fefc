"""The models of a key: their pages and limits, the same from the local and the remote services."""

from __future__ import annotations

import pytest

from pomelo.app import App
from pomelo.call import Call
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest, ListModelsResponse, Model
from pomelo.service import Services, list_all_models
from tests.calls import call_of, refusal
from tests.conftest import Keys


@pytest.mark.parametrize("size", [1, 3, 13, 14, 1_001])
async def test_models_are_listed_in_pages_ordered_by_id(
    size: int, remote: Services, app: App, keys: Keys
) -> None:
    everything = await list_all_models(app.services.models, call_of(keys.test))
    ids = [model.id for model in everything]
    assert (len(ids), ids) == (14, sorted(ids))
    for services in (app.services, remote):
        pages: list[list[Model]] = []
        request = ListModelsRequest(page_size=size)
        while request.page_token or not pages:
            page = await services.models.list_models(request, call_of(keys.test))
            pages.append(list(page.models))
            request.page_token = page.next_page_token
        assert [model for page in pages for model in page] == everything
        assert [len(page) for page in pages[:-1]] == [size] * (len(pages) - 1)
        for name, wrong in (
            ("page_size", ListModelsRequest(page_size=-1)),
            ("page_token", ListModelsRequest(page_token="x")),
        ):
            error = await refusal(services.models.list_models(wrong, call_of(keys.test)))
            assert (error.code, error.field) == ("invalid_parameter", name)


async def test_a_page_of_models_has_only_those_that_the_key_may_use(remote: Services, keys: Keys) -> None:
    page = await remote.models.list_models(ListModelsRequest(page_size=1), call_of(keys.only_haiku))
    assert ([model.id for model in page.models], page.next_page_token) == (["claude-3-haiku"], "")


async def test_all_models_are_read_from_as_many_pages_as_they_have(app: App, keys: Keys) -> None:
    models = app.services.models
    tokens: list[str] = []

    class SmallPages:
        async def list_models(self, request: ListModelsRequest, call: Call) -> ListModelsResponse:
            tokens.append(request.page_token)
            smaller = ListModelsRequest(page_size=5, page_token=request.page_token)
            return await models.list_models(smaller, call)

        async def get_model(self, model_id: str, call: Call) -> Model:
            return await models.get_model(model_id, call)

    call = call_of(keys.test)
    assert await list_all_models(SmallPages(), call) == await list_all_models(models, call)
    assert len(set(tokens)) == len(tokens) == 3


async def test_limits_that_do_not_apply_to_a_model_are_absent(app: App, keys: Keys) -> None:
    text = await app.services.models.get_model("gpt-4", call_of(keys.test))
    speech = await app.services.models.get_model("eleven-labs-tts", call_of(keys.test))
    assert {field.name for field, _ in text.limits.ListFields()} == {"max_input_tokens", "max_output_tokens"}
    assert {field.name for field, _ in speech.limits.ListFields()} == {"max_characters"}


async def test_models_are_the_same_as_from_the_local_services(remote: Services, app: App, keys: Keys) -> None:
    local = await list_all_models(app.services.models, call_of(keys.live))
    assert await list_all_models(remote.models, call_of(keys.live)) == local
    listed = await list_all_models(remote.models, call_of(keys.test))
    assert await remote.models.get_model("flux-1-pro", call_of(keys.test)) in listed
    for name, key, code in [
        ("", keys.test, "missing_parameter"),
        ("nope", keys.test, "model_not_found"),
        ("gpt-4", keys.only_haiku, "model_not_allowed"),
        ("", keys.revoked, "invalid_api_key"),
        ("nope", keys.revoked, "invalid_api_key"),
    ]:
        assert (await refusal(remote.models.get_model(name, call_of(key)))).code == code
