"""What the endpoints of one process share, made when it starts and closed when it stops."""

from __future__ import annotations

from pathlib import Path

from medley.api.auth import Authenticator
from medley.api.job_reads import JobReads
from medley.api.sql import Sql
from medley.api.waiters import WaiterHub
from medley.config import Settings
from medley.rings import Ringer, pool_channel
from medley.spec.base_models import BaseModel, read_base_model
from medley.store import Store


class Services:
    """Connections, reads of jobs, the waiter hub, the ringer, the adapter store."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sql = Sql(settings.database_url)
        self.auth = Authenticator(self.sql)
        self.job_reads = JobReads(self.sql)
        self.hub = WaiterHub(self.sql, settings.redis_url)
        self.ringer = Ringer(settings.redis_url)
        self.store = Store.open(settings.store_url)
        # Uploads are judged against it. Its weights are the workers' alone.
        self.base: BaseModel | None = None
        if settings.model is not None:
            self.base = read_base_model(Path(settings.model), need_weights=False)

    def ring_pool(self) -> None:
        """Wakes the dispatcher: there is work."""
        self.ringer.ring(pool_channel(self.settings.pool))

    async def close(self) -> None:
        await self.hub.close()
        await self.sql.call(self.ringer.close)
        self.sql.close()
