"""The embedded Redis: its command line, and whether it answers.

It keeps nothing on disk, since no promise rests on Redis. It knows nothing of queues.
"""

from __future__ import annotations

import redis

from medley.local.binaries import Binaries
from medley.local.child import Account, Command
from medley.local.datadir import DataDir


class RedisServer:
    """Redis on a Unix socket, without persistence and without eviction."""

    def __init__(self, data: DataDir, binaries: Binaries, account: Account | None) -> None:
        self._data = data
        self._binaries = binaries
        self._account = account

    @property
    def url(self) -> str:
        return f"unix://{self._data.sockets}/redis.sock"

    def command(self) -> Command:
        settings = {
            "port": "0",
            "unixsocket": f"{self._data.sockets}/redis.sock",
            "unixsocketperm": "700",
            "dir": str(self._data.sockets),
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",  # evicting a queue would lose messages silently
            "daemonize": "no",
            "loglevel": "warning",
        }
        flags = [flag for key, value in settings.items() for flag in (f"--{key}", value)]
        return Command(
            name="redis",
            argv=(str(self._binaries.redis_server), *flags),
            env={"LC_ALL": "C", "TZ": "UTC"},
            cwd=self._data.sockets,
            account=self._account,
        )

    def is_ready(self) -> bool:
        """True where it answers a ping."""
        client = redis.Redis.from_url(self.url, socket_timeout=1, socket_connect_timeout=1)
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False
        finally:
            client.close()
