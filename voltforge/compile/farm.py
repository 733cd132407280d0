"""Share the compile work of one build among several hosts: each object is compiled by one host, for all.

Every host runs the same build, from its own sources, with its own toolchain, in its own sandbox. There is no central
scheduler. Before a host compiles an object it claims the object on the redis server of the object cache. The other
hosts wait until the object is done, and take it from the cache. The claims of a dead host expire. A claim decides only
which host compiles an object: ccache finds objects by the content of their sources.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from voltforge.errors import VoltforgeError
from voltforge.system import console, files
from voltforge.system.urls import redacted

if TYPE_CHECKING:
    from redis import Redis

T = TypeVar("T")

CLAIM_SECONDS = 15.0
"""Lifetime of a claim, and of a host's entry, that its host does not renew."""
RENEW_SECONDS = 4.0
"""Seconds between two renewals."""
DONE_SECONDS = 60
"""Seconds in which an object that is done cannot be claimed: every waiting host takes it from the cache."""
HISTORY_SECONDS = 86_400
"""Seconds for which the server keeps which host compiled which object."""
TIMEOUT = 2.0
"""Seconds in which the server must answer. The scheduler waits for the answer."""
MAX_FAILURES = 3
"""Failed requests in a row after which this host stops using the server."""
MIN_COMPILE_SECONDS = 1.0
"""A faster command is counted as a cache hit, not as a compile."""
DONE_MARK = "+"
"""First character of a claim whose object is done."""
PREFIX = "voltforge"
"""First part of all keys on the server. The keys of ccache are hexadecimal."""
HOSTS = f"{PREFIX}:hosts"
"""Key of the set of all hosts' keys."""

ObjectKey = tuple[str, str]
"""The identifier of a build (:func:`build_id`) and the path of an object in it."""


@dataclass(frozen=True)
class Host:
    """A host that builds a package, from its entry on the server."""

    name: str
    package: str
    build: str
    """The identifier of its build."""
    made_with: Mapping[str, str]
    """Digests of what an object depends on besides its source, by description. Equal hosts can share objects."""

    def differences(self, other: Host) -> str:
        """Return what another host of the same package has different, as words; empty if both can share objects."""
        if self.package != other.package or self.build == other.build:
            return ""
        return ", ".join(name for name in self.made_with if other.made_with.get(name) != self.made_with[name])


@dataclass
class Farm:
    """The hosts that share one redis server. If the server fails, this host compiles everything itself."""

    address: str
    """``redis://[:password@]host[:port]``."""
    name: str = field(default_factory=platform.node)
    """The name of this host."""
    _failures: int = 0
    _failures_lock: threading.Lock = field(default_factory=threading.Lock)
    _renewed: float = 0.0

    def __str__(self) -> str:
        return redacted(self.address)

    def holders(self, keys: Sequence[ObjectKey]) -> list[str]:
        """Return for each object the host that compiles it now; empty if this host may compile it."""
        claims = self._try(lambda redis: redis.mget([_key(key) for key in keys])) if keys else []
        return [_holder(claim) for claim in claims or [None] * len(keys)]

    def claim(self, key: ObjectKey) -> str:
        """Claim an object for this host. Return the host that holds it already; empty if this host may compile it."""

        def claim(redis: Redis) -> object:
            claimed = redis.set(_key(key), self.name, nx=True, px=int(CLAIM_SECONDS * 1000))
            return None if claimed else redis.get(_key(key))

        return _holder(self._try(claim))

    def renew_claims(self, keys: Iterable[ObjectKey]) -> None:
        """Renew this host's claims, at most once in :data:`RENEW_SECONDS`."""
        now = time.monotonic()
        if now - self._renewed < RENEW_SECONDS:
            return
        self._renewed = now

        def renew(redis: Redis) -> None:
            with redis.pipeline(transaction=False) as batch:
                for key in keys:
                    batch.set(_key(key), self.name, xx=True, px=int(CLAIM_SECONDS * 1000))
                batch.execute()

        self._try(renew)

    def mark_done(self, key: ObjectKey, seconds: float) -> None:
        """Release an object that took ``seconds`` here, so that all hosts take it from the cache."""

        def mark(redis: Redis) -> None:
            build, name = key
            with redis.pipeline(transaction=False) as batch:
                batch.set(_key(key), DONE_MARK + self.name, ex=DONE_SECONDS)
                if seconds >= MIN_COMPILE_SECONDS:
                    batch.hset(_key((build, "")), name, self.name)
                    batch.expire(_key((build, "")), HISTORY_SECONDS)
                batch.execute()

        self._try(mark)

    @contextlib.contextmanager
    def register(self, package: str, made_with: Mapping[str, str]) -> Iterator[None]:
        """List this host on the server during a build, and warn of hosts that cannot share objects with it."""
        host = Host(self.name, package, build_id(package, made_with), made_with)
        key, ended = f"{PREFIX}:host:{self.name}/{os.getpid()}/{package}", threading.Event()
        row = json.dumps({"name": host.name, "package": package, "build": host.build, "made_with": dict(made_with)})

        def publish(redis: Redis) -> None:
            redis.sadd(HOSTS, key)
            redis.set(key, row, px=int(CLAIM_SECONDS * 1000))

        def keep_registered() -> None:
            warned: set[str] = set()
            while True:
                self._try(publish)
                for other in self.hosts():
                    if (differences := host.differences(other)) and other.name not in warned:
                        warned.add(other.name)
                        console.warn(f"{other.name} cannot share objects of {package}: it differs in {differences}")
                if ended.wait(RENEW_SECONDS):
                    return

        thread = threading.Thread(target=keep_registered, name="farm", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._try(lambda redis: redis.delete(key))

    def hosts(self) -> list[Host]:
        """Return the hosts that build now, sorted by name. Invalid entries are ignored, expired entries removed."""

        def fetch(redis: Redis) -> list[Any]:
            keys = list(redis.smembers(HOSTS))
            rows = list(redis.mget(keys)) if keys else []
            if expired := [key for key, row in zip(keys, rows, strict=True) if row is None]:
                redis.srem(HOSTS, *expired)
            return rows

        return sorted(filter(None, map(_host, self._try(fetch) or [])), key=lambda host: (host.name, host.package))

    def compiled_by_host(self, build: str) -> Counter[str]:
        """Count the objects of a build that each host compiled."""
        return Counter(map(str, self._try(lambda redis: redis.hvals(_key((build, "")))) or []))

    def check_connection(self) -> None:
        """Connect to the server.

        Raises:
            VoltforgeError: the server does not answer.
        """
        from redis import RedisError

        try:
            self._redis.ping()
        except (RedisError, OSError) as error:
            raise VoltforgeError(f"{self} does not answer ({error})", hint="redis-cli -h HOST ping") from error

    @cached_property
    def _redis(self) -> Redis:
        from redis import Redis  # the import takes a tenth of a second
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        return Redis.from_url(
            self.address, retry=Retry(NoBackoff(), 0), socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT,
            decode_responses=True, encoding_errors="replace",
        )  # fmt: skip

    def _try(self, request: Callable[[Redis], T]) -> T | None:
        """Return the server's answer, or ``None`` if it fails. After :data:`MAX_FAILURES` the server is not used."""
        from redis import RedisError

        if self._failures >= MAX_FAILURES:
            return None
        try:
            answer = request(self._redis)
        except (RedisError, OSError, ValueError) as error:
            with self._failures_lock:  # the scheduler and the build have a thread each
                self._failures += 1
                given_up = self._failures == MAX_FAILURES
            if given_up:
                console.warn(f"{self} failed {MAX_FAILURES} times ({error}): this host compiles all objects itself")
            return None
        self._failures = 0
        return answer


def build_id(package: str, made_with: Mapping[str, str]) -> str:
    """Return the identifier of a build. It is equal on all hosts that can share objects."""
    return files.digest([package, dict(made_with)])[:16]


def _key(key: ObjectKey) -> str:
    return ":".join((PREFIX, *key))


def _holder(claim: object) -> str:
    """Return the host of a claim; empty if there is no claim or its object is done."""
    return "" if claim is None or str(claim).startswith(DONE_MARK) else str(claim)


def _host(row: Any) -> Host | None:
    try:
        entry: Any = json.loads(row or "")
        made_with = {str(name): str(value) for name, value in entry["made_with"].items()}
        return Host(str(entry["name"]), str(entry["package"]), str(entry["build"]), made_with)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
