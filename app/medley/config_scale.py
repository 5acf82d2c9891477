"""Configuration of the dispatcher towards those who start and stop machines: the scale hook, and metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from medley.connection_urls import is_loopback
from medley.environment import ConfigError, Environment
from medley.spec.webhooks import read_secret

MIN_SECRET_BYTES = 24  # of the hook's; as Standard Webhooks asks


@dataclass(frozen=True, kw_only=True)
class ScaleSettings:
    """What the dispatcher tells those who start and stop machines."""

    hook: str | None = None  # an executable's path or a URL; None: nobody is called
    hook_secret: str | None = field(default=None, repr=False)  # whsec_..., of a URL
    hook_timeout_s: float = 30.0
    wait_s: float = 30.0  # as many workers are wanted as would begin all that waits within this time
    release_after_s: float = 600.0  # of sleep, after which a worker may be released
    repeat_s: float = 60.0  # while a condition stands
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None  # None: no metrics are served


def read_scale(read: Environment) -> ScaleSettings:
    """Raises ConfigError."""
    default = ScaleSettings()
    hook, secret = read.text("MEDLEY_SCALE_HOOK"), read.secret("MEDLEY_SCALE_HOOK_SECRET")
    if hook is not None and hook.startswith(("http://", "https://")):
        parts = urlsplit(hook)
        if parts.hostname is None or parts.username is not None or parts.fragment:
            raise ConfigError("MEDLEY_SCALE_HOOK", hook, "a URL with a host, without a user and a fragment")
        is_excused = is_loopback(parts.hostname) or parts.hostname in read.plaintext_hosts
        if parts.scheme == "http" and not is_excused:
            wanted = "https://, or the host in MEDLEY_PLAINTEXT_HOSTS where the network itself is trusted"
            raise ConfigError("MEDLEY_SCALE_HOOK", hook, wanted)
        try:
            is_signed = secret is not None and len(read_secret(secret)) >= MIN_SECRET_BYTES
        except ValueError:
            is_signed = False
        if not is_signed:
            wanted = f"whsec_ and at least {MIN_SECRET_BYTES} bytes in base64, with which calls of the URL are signed"
            raise ConfigError("MEDLEY_SCALE_HOOK_SECRET", secret, wanted)
    return ScaleSettings(
        hook=hook,
        hook_secret=secret,
        hook_timeout_s=read.seconds("MEDLEY_SCALE_HOOK_TIMEOUT_S", default.hook_timeout_s),
        wait_s=read.seconds("MEDLEY_SCALE_WAIT_S", default.wait_s),
        release_after_s=read.seconds("MEDLEY_SCALE_RELEASE_AFTER_S", default.release_after_s),
        repeat_s=read.seconds("MEDLEY_SCALE_REPEAT_S", default.repeat_s),
        metrics_host=read.text("MEDLEY_METRICS_HOST") or default.metrics_host,
        metrics_port=read.optional_whole("MEDLEY_METRICS_PORT", low=0, high=65535),
    )
