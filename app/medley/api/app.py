"""The application: routers, middleware and the life of what they share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from medley.api import (
    adapters,
    audit,
    batch_adapters,
    batch_changes,
    batches,
    diffs,
    errors,
    grants,
    health,
    jobs,
    keys,
    openapi,
    quotas,
    reports,
    results,
    sweeps,
    tenants,
    usage,
    webhooks,
    workers,
)
from medley.api.limits import BodyLimit
from medley.api.openai import batches as openai_batches
from medley.api.openai import completions as openai_completions
from medley.api.openai import files as openai_files
from medley.api.openai import models as openai_models
from medley.api.request_ids import RequestIds
from medley.api.services import Services
from medley.config import Settings

ROUTERS = (
    health,
    tenants,
    jobs,
    batches,
    batch_changes,
    batch_adapters,
    results,
    adapters,
    grants,
    sweeps,
    reports,
    diffs,
    usage,
    webhooks,
    workers,
    keys,
    quotas,
    audit,
    openai_files,
    openai_batches,
    openai_models,
    openai_completions,
    openapi,
)


def create_app(settings: Settings) -> FastAPI:
    """The service of one process. `app.state.services` is there while it runs. Opens nothing before."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = Services(settings)
        app.state.services = services
        services.hub.start()
        try:
            yield
        finally:
            await services.close()

    # Bodies are decoded by msgspec, so FastAPI has no schema of them to show; `openapi` has.
    app = FastAPI(title="Medley", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.add_middleware(BodyLimit, limits=settings.limits)
    app.add_middleware(RequestIds)
    errors.install(app)
    for module in ROUTERS:
        app.include_router(module.router)
    return app
