"""The service interfaces between the front ends (gRPC server, REST gateway, command line) and what they call.

Each has one implementation in this process and one over a gRPC channel (`pomelo.server.remote`); a front end
doesn't know which one it holds. All methods raise `PomeloError` and nothing else. Those that take a `Call`
fill its `response_headers`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from pomelo.call import Call
from pomelo.errors import PomeloError, unsupported_model
from pomelo.gen.admin.v1 import admin_service_pb2 as pb
from pomelo.gen.v1.account_service_pb2 import (
    Account,
    ListUsageRequest,
    ListUsageResponse,
    SumUsageRequest,
    SumUsageResponse,
)
from pomelo.gen.v1.media_pb2 import Media
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest, ListModelsResponse, Model
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions


class Visit(Protocol):
    """An admitted call. Close it when the call ends."""

    def reserve(self, size: int) -> None:
        """Counts `size` more bytes of the call's body or message as buffered, until it is closed.

        Raises:
            PomeloError: overloaded; nothing was counted.
        """

    def hold(self, size: int) -> Callable[[], None]:
        """Counts a response of `size` bytes as unread until the returned function is called, once, perhaps
        after the visit was closed. An account with too many unread bytes is not admitted."""

    def is_alone(self) -> bool:
        """Returns whether no call of another account is in flight."""

    async def refuse(self, error: PomeloError, model: str = "") -> PomeloError:
        """Returns the error to report when the body or message is refused with `error`: `error` itself, or
        one that takes precedence (of a header, the model, the requests per minute). Fills
        `call.response_headers`.

        An unreadable or too large body, and a refused one above 64 KiB, counts as a request. `model` is the
        model that the body names, empty if it can't be read.
        """

    async def refuse_task(self, error: PomeloError) -> PomeloError:
        """Returns the error to report when a task is refused although its body could be read: as `refuse` if
        the task is invalid and its body is above 64 KiB, otherwise `error` itself."""

    def close(self) -> None:
        """Ends the call. Idempotent."""


class AccessService(Protocol):
    """Authenticates calls by their headers, before the body or message is read."""

    async def admit(self, call: Call) -> Visit:
        """Checks the key, and counts the call as in flight for its account until the visit is closed.

        Raises:
            PomeloError: invalid_api_key, concurrency_limit_exceeded, overloaded, store_unavailable.
        """


class TaskService(Protocol):
    """Runs tasks."""

    async def run_task(self, spec: TaskSpec, options: TaskOptions, call: Call) -> TaskResult:
        """Runs a task and returns its result. Cancelling closes the request to the provider.

        Raises:
            PomeloError: any code; nothing was delivered.
        """

    def stream_task(
        self, spec: TaskSpec, options: TaskOptions, call: Call
    ) -> AbstractAsyncContextManager[AsyncIterator[TaskEvent]]:
        """Runs a task and yields its events, in the order that the contract defines.

        Entering does all checks that come before the provider's call, and completes `call.response_headers`.
        Leaving in any way closes the request to the provider. The deadline bounds the body of the
        `async with`, too.

        Raises:
            PomeloError: on entering, on the next event, or on leaving; the events before it stay valid, and
                the stream is incomplete.
        """


class ModelService(Protocol):
    """Lists the models."""

    async def list_models(self, request: ListModelsRequest, call: Call) -> ListModelsResponse:
        """Returns a page of the models that the caller's key may use, sorted by id.

        Raises:
            PomeloError: invalid_api_key, invalid_parameter, model_not_allowed (the account's plan no longer
                exists), store_unavailable.
        """

    async def get_model(self, model_id: str, call: Call) -> Model:
        """Returns one model.

        Raises:
            PomeloError: invalid_api_key, missing_parameter, model_not_found, model_not_allowed (checked in
                this order), or store_unavailable.
        """


async def get_task_model(models: ModelService, name: str, call: Call) -> Model:
    """Returns the model of a task.

    Raises:
        PomeloError: as `ModelService.get_model`, but unsupported_model in place of model_not_found.
    """
    try:
        return await models.get_model(name, call)
    except PomeloError as error:
        if error.code != "model_not_found":
            raise
        raise unsupported_model(name) from None


async def list_all_models(models: ModelService, call: Call) -> list[Model]:
    """Returns all models that the caller's key may use, sorted by id, from as many pages as they have.

    Raises:
        PomeloError: invalid_api_key, model_not_allowed (the account's plan no longer exists),
            store_unavailable.
    """
    found: list[Model] = []
    request = ListModelsRequest(page_size=1_000)
    while True:
        page = await models.list_models(request, call)
        found += page.models
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


class MediaService(Protocol):
    """Stores and returns audio and images."""

    async def upload_media(self, content_type: str, chunks: AsyncIterator[bytes], call: Call) -> Media:
        """Stores `chunks` as they arrive; nothing is kept when it raises or is cancelled.

        An empty `content_type` is detected from the bytes. The key is checked before the first chunk is
        read, and again before a file is stored that outlives the call.

        Raises:
            PomeloError: invalid_api_key, payload_too_large, store_unavailable, or what `chunks` raises.
        """

    def download_media(
        self, media_id: str, signature: str, call: Call, offset: int = 0
    ) -> AbstractAsyncContextManager[tuple[Media, AsyncIterator[bytes]]]:
        """Opens a media file, and yields its metadata and its bytes from `offset` on, in chunks of at most
        256 KiB; a negative `offset` counts from the end.

        `signature` is the query string of a signed link, which replaces the key; or empty.

        Raises:
            PomeloError: on entering: invalid_api_key (without a signature or a valid key), missing_parameter,
                not_found, store_unavailable; later: provider_unavailable when the file is truncated.
        """


class AccountService(Protocol):
    """Shows the account of the caller's key, in the key's mode (live or test)."""

    async def get_account(self, call: Call) -> Account:
        """Returns the plan, its limits, and the credits.

        Raises:
            PomeloError: invalid_api_key, model_not_allowed (its plan no longer exists), store_unavailable.
        """

    async def list_usage(self, request: ListUsageRequest, call: Call) -> ListUsageResponse:
        """Returns a page of usage records, newest first.

        Raises:
            PomeloError: invalid_api_key, invalid_parameter, deadline_exceeded, store_unavailable.
        """

    async def sum_usage(self, request: SumUsageRequest, call: Call) -> SumUsageResponse:
        """Returns a page of sums of usage records, ordered by their groups.

        Raises:
            PomeloError: invalid_api_key, missing_parameter, invalid_parameter, deadline_exceeded,
                store_unavailable.
        """


class Operator(Protocol):
    """Administers keys, accounts and usage. It checks no key: clients that reach it may do everything.

    Its methods are those of AdminService, which admin_service.proto documents.

    Raises:
        PomeloError: missing_parameter, invalid_parameter, not_found, store_unavailable.
    """

    async def create_key(self, request: pb.CreateKeyRequest) -> pb.CreateKeyResponse: ...

    async def list_keys(self, request: pb.ListKeysRequest) -> pb.ListKeysResponse: ...

    async def rotate_key(self, request: pb.RotateKeyRequest) -> pb.RotateKeyResponse: ...

    async def revoke_key(self, request: pb.RevokeKeyRequest) -> pb.RevokeKeyResponse: ...

    async def set_key_budget(self, request: pb.SetKeyBudgetRequest) -> pb.SetKeyBudgetResponse: ...

    async def create_account(self, request: pb.CreateAccountRequest) -> pb.CreateAccountResponse: ...

    async def list_accounts(self, request: pb.ListAccountsRequest) -> pb.ListAccountsResponse: ...

    async def get_account(self, request: pb.GetAccountRequest) -> pb.GetAccountResponse: ...

    async def grant_credits(self, request: pb.GrantCreditsRequest) -> pb.GrantCreditsResponse: ...

    async def adjust_credits(self, request: pb.AdjustCreditsRequest) -> pb.AdjustCreditsResponse: ...

    async def set_credit_limit(self, request: pb.SetCreditLimitRequest) -> pb.SetCreditLimitResponse: ...

    async def disable_account(self, request: pb.DisableAccountRequest) -> pb.DisableAccountResponse: ...

    async def enable_account(self, request: pb.EnableAccountRequest) -> pb.EnableAccountResponse: ...

    async def set_account_plan(self, request: pb.SetAccountPlanRequest) -> pb.SetAccountPlanResponse: ...

    async def list_usage(self, request: pb.ListUsageRequest) -> pb.ListUsageResponse: ...

    async def sum_usage(self, request: pb.SumUsageRequest) -> pb.SumUsageResponse: ...

    async def audit_ledger(self, request: pb.AuditLedgerRequest) -> pb.AuditLedgerResponse: ...

    async def list_acts(self, request: pb.ListActsRequest) -> pb.ListActsResponse: ...

    async def get_server(self, request: pb.GetServerRequest) -> pb.GetServerResponse: ...


@dataclass(frozen=True, slots=True)
class Services:
    """The services that a front end needs."""

    tasks: TaskService
    models: ModelService
    media: MediaService
    accounts: AccountService
    access: AccessService
