"""An environment as typed values: look-ups that say which key is wrong, what it holds and what was wanted.

Knows which keys hold secrets: their values are in no error, and may stand in files (KEY_FILE). What keys there are is
`config`'s; nothing here reads the process's own environment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

# The keys whose values hold passwords: errors never show them, and each may come as KEY_FILE, the path of a file.
SECRET_KEYS = frozenset(
    {
        "MEDLEY_DATABASE_URL",
        "MEDLEY_DATABASE_PASSWORD",
        "MEDLEY_REDIS_URL",
        "MEDLEY_REDIS_PASSWORD",
        "MEDLEY_STORE_URL",
        "MEDLEY_STORE_ACCESS_KEY",
        "MEDLEY_STORE_SECRET_KEY",
        "MEDLEY_API_PASSWORD",
        "MEDLEY_WORK_PASSWORD",
        "MEDLEY_SCALE_HOOK_SECRET",
    }
)

T = TypeVar("T")


class ConfigError(Exception):
    """A key of the environment is missing or holds what it must not."""

    def __init__(self, key: str, got: str | None, wanted: str) -> None:
        shown = "nothing" if got is None else "<secret>" if key in SECRET_KEYS else repr(got)
        super().__init__(f"{key}: got {shown}, wanted {wanted}")
        self.key = key


class Environment:
    """Typed look-ups in one environment; an empty value counts as not set (compose passes those)."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def text(self, key: str) -> str | None:
        return self._environ.get(key) or None

    def secret(self, key: str) -> str | None:
        """The value of `key`, or what stands in the file that `key`_FILE names (less the line's end)."""
        value, path = self.text(key), self.text(f"{key}_FILE")
        if path is None:
            return value
        if value is not None:
            raise ConfigError(f"{key}_FILE", path, f"one of {key} and {key}_FILE")
        try:
            content = Path(path).read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{key}_FILE", path, f"a text file that can be read ({type(error).__name__})") from None
        if not content:
            raise ConfigError(f"{key}_FILE", path, "a file that is not empty")
        return content

    @property
    def allows_weak_secrets(self) -> bool:
        return self.flag("MEDLEY_ALLOW_WEAK_SECRETS", False)

    @property
    def plaintext_hosts(self) -> frozenset[str]:
        """Hosts that may be spoken to without encryption."""
        return frozenset(
            host.strip() for host in (self.text("MEDLEY_PLAINTEXT_HOSTS") or "").split(",") if host.strip()
        )

    def url(self, key: str, schemes: set[str]) -> str:
        value = self.secret(key)
        wanted = "a URL that begins with " + " or ".join(f"{s}://" for s in sorted(schemes))
        if value is None or urlsplit(value).scheme not in schemes:
            raise ConfigError(key, value, wanted)
        return value

    def choice(self, key: str, default: str, allowed: AbstractSet[str]) -> str:
        value = self.text(key) or default
        if value not in allowed:
            raise ConfigError(key, value, "one of " + ", ".join(sorted(allowed)))
        return value

    def optional_choice(self, key: str, allowed: AbstractSet[str]) -> str | None:
        return None if self.text(key) is None else self.choice(key, "", allowed)

    def whole(self, key: str, default: int, *, low: int, high: int | None = None) -> int:
        value = self.optional_whole(key, low=low, high=high)
        return default if value is None else value

    def optional_whole(self, key: str, *, low: int, high: int | None = None) -> int | None:
        bound = f"a whole number of at least {low}" + ("" if high is None else f" and at most {high}")
        value = self._parsed(key, int, bound)
        if value is not None and (value < low or (high is not None and value > high)):
            raise ConfigError(key, self.text(key), bound)
        return value

    def flag(self, key: str, default: bool) -> bool:
        return self.choice(key, str(default).lower(), {"true", "false"}) == "true"

    def seconds(self, key: str, default: float) -> float:
        value = self._above_zero(key, "seconds", 3600)
        return default if value is None else value

    def per_second(self, key: str, default: float) -> float:
        value = self._above_zero(key, "a number", 1_000_000)
        return default if value is None else value

    def optional_milliseconds(self, key: str) -> float | None:
        return self._above_zero(key, "milliseconds", 3_600_000)

    def optional_share(self, key: str) -> float | None:
        return self._above_zero(key, "a share", 1)

    def _above_zero(self, key: str, unit: str, high: float) -> float | None:
        wanted = f"{unit} above 0 and at most {high}"
        value = self._parsed(key, float, wanted)
        if value is not None and not 0 < value <= high:
            raise ConfigError(key, self.text(key), wanted)
        return value

    def _parsed(self, key: str, parse: Callable[[str], T], wanted: str) -> T | None:
        text = self.text(key)
        if text is None:
            return None
        try:
            return parse(text)
        except ValueError:
            raise ConfigError(key, text, wanted) from None
