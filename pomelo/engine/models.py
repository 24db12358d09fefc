"""The models that callers may use, from the catalogue and the configured providers."""

from __future__ import annotations

from datetime import date

from google.protobuf.timestamp_pb2 import Timestamp

from pomelo.accounts import pages
from pomelo.accounts.access import Access
from pomelo.call import Call, Principal
from pomelo.catalog.catalog import Catalog, Model
from pomelo.catalog.pricing import UnitPrices
from pomelo.catalog.retirement import start_of
from pomelo.engine.routing import Router
from pomelo.errors import PomeloError, missing, model_not_found
from pomelo.gen.v1 import model_service_pb2 as model_pb
from pomelo.tasks import TASK_TYPES


class LocalModels:
    """Lists models in this process; implements `pomelo.service.ModelService`."""

    def __init__(self, catalog: Catalog, router: Router, access: Access) -> None:
        self._catalog = catalog
        self._router = router
        self._access = access

    def configure(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def list_models(
        self, request: model_pb.ListModelsRequest, call: Call
    ) -> model_pb.ListModelsResponse:
        principal = await self._access.identify(call)
        size = pages.page_size(request.page_size)
        (after,) = pages.read_token(request.page_token, "models", str) or ("",)
        models = [
            self._describe(model, principal)
            for name, model in self._catalog.models.items()
            if name > after and self._access.may_use(principal, name)
        ]
        page, token = pages.first_page(models, size, "models", lambda last: (models[last].id,))
        return model_pb.ListModelsResponse(models=page, next_page_token=token)

    async def get_model(self, model_id: str, call: Call) -> model_pb.Model:
        principal = await self._access.identify(call, model_id)
        if not model_id:
            raise missing("id")
        if model_id not in self._catalog.by_any_name:
            raise model_not_found(model_id)
        return self._describe(self._access.model(model_id, principal), principal)

    def _describe(self, model: Model, principal: Principal) -> model_pb.Model:
        route = model.routes[0]
        try:
            found = self._router.candidates(model, TASK_TYPES[model.task_type].name, live=principal.live)
            if principal.live:  # a test key pays what the first route costs
                route = found[0].route
            available = True
        except PomeloError:
            available = False
        limits = model.limits
        prices, price_version = model.prices_for(route)
        return model_pb.Model(
            id=model.name,
            task_type=model.task_type,
            limits=model_pb.ModelLimits(
                max_input_tokens=limits.max_input_tokens or None,
                max_output_tokens=limits.max_output_tokens or None,
                max_characters=limits.max_characters or None,
                max_audio_seconds=limits.max_audio_seconds or None,
            ),
            prices=_lines(prices.units),
            price_version=price_version,
            available=available,
            price_tiers=[
                model_pb.PriceTier(min_input_tokens=least, prices=_lines(units))
                for least, units in prices.tiers
            ],
            deprecate_time=_time(model.deprecated),
            retire_time=_time(model.retires),
        )


def _lines(units: UnitPrices) -> list[model_pb.Price]:
    return [model_pb.Price(unit=unit, amount_micros=micros) for unit, micros in units.items()]


def _time(day: date | None) -> Timestamp | None:
    return None if day is None else Timestamp(seconds=int(start_of(day).timestamp()))
