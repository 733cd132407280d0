"""A farm: hosts that build the same at the same time, and of which one compiles each object for all.

There is no scheduler and no build server. Every host runs the same build of its own sources with its own toolchain, in
its own sandbox. Before its gate lets an object through, it claims it on the redis server that keeps the objects too;
what another host has claimed waits, until it is done there and comes from that server, as from any cache. A host that
dies loses its claims. What is said here decides who compiles, never what: ccache decides that by contents.
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
from voltforge.sources.index import redacted
from voltforge.system import console, files

if TYPE_CHECKING:
    from redis import Redis

T = TypeVar("T")

LEASE = 15.0
"""Seconds after which the claims of a host that died lapse."""
RENEW = 4.0
"""Seconds between two times that a host says that it lives."""
DONE = 60
"""Seconds in which an object that is done is not claimed anew: all who waited take it at once."""
DAY = 86_400
"""Seconds in which it is known who compiled what."""
PATIENCE = 2.0
"""Seconds in which the server has to answer; the gate waits so long."""
STRIKES = 3
"""So many times in a row that it does not, and this host goes on alone."""
BRIEF = 1.0
"""Seconds below which an object is taken to have come from the cache."""
MARK = "+"
"""What a claim begins with once its object is done."""
PREFIX = "voltforge"
"""What all keys on the server begin with; ccache's own are hexadecimal."""
HOSTS = f"{PREFIX}:hosts"
"""The key under which are those of all hosts."""

Object = tuple[str, str]
"""One object: the name of the build that it belongs to, and its path."""


@dataclass(frozen=True)
class Host:
    """A host that builds, as it says itself."""

    name: str
    package: str
    build: str
    made_with: Mapping[str, str]
    """What decides about objects besides their sources: two hosts that differ in it have nothing for each other."""

    def stranger(self, other: Host) -> str:
        """What another host that builds the same package has otherwise, as words; empty if nothing."""
        if self.package != other.package or self.build == other.build:
            return ""
        return ", ".join(name for name in self.made_with if other.made_with.get(name) != self.made_with[name])


@dataclass
class Farm:
    """The hosts that meet at one server."""

    address: str
    """``redis://[:password@]host[:port]``."""
    name: str = field(default_factory=platform.node)
    """What this host is called."""
    _strikes: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _renewed: float = 0.0

    def __str__(self) -> str:
        return redacted(self.address)

    # What the gate asks; it never fails, for a host alone builds as well.

    def holders(self, asked: Sequence[Object]) -> list[str]:
        """For each object the host that compiles it now; empty for those that may be let through here."""
        said = self._try(lambda redis: redis.mget([_key(one) for one in asked])) if asked else []
        return [_holder(one) for one in said or [None] * len(asked)]

    def claim(self, one: Object) -> str:
        """Take an object for this host; gives the host that has it, or nothing where this one may go on."""

        def take(redis: Redis) -> object:
            mine = redis.set(_key(one), self.name, nx=True, px=int(LEASE * 1000))
            return None if mine else redis.get(_key(one))

        return _holder(self._try(take))

    def renew(self, held: Iterable[Object]) -> None:
        """Keep the claims that this host has; it may be asked often."""
        now = time.monotonic()
        if now - self._renewed < RENEW:
            return
        self._renewed = now

        def extend(redis: Redis) -> None:
            with redis.pipeline(transaction=False) as batch:
                for one in held:
                    batch.set(_key(one), self.name, xx=True, px=int(LEASE * 1000))
                batch.execute()

        self._try(extend)

    def done(self, one: Object, seconds: float) -> None:
        """Let all have an object that took so long here."""

        def tell(redis: Redis) -> None:
            with redis.pipeline(transaction=False) as batch:
                batch.set(_key(one), MARK + self.name, ex=DONE)
                if seconds >= BRIEF:
                    batch.hset(_key((one[0], "")), one[1], self.name)
                    batch.expire(_key((one[0], "")), DAY)
                batch.execute()

        self._try(tell)

    # What a build and a person ask.

    @contextlib.contextmanager
    def taking_part(self, package: str, made_with: Mapping[str, str]) -> Iterator[None]:
        """Around a build: the others see this host, and it is said which of them are of no use to it."""
        me = Host(self.name, package, named(package, made_with), made_with)
        key, ended = f"{PREFIX}:host:{self.name}/{os.getpid()}/{package}", threading.Event()
        row = json.dumps({"name": me.name, "package": package, "build": me.build, "made_with": dict(made_with)})

        def say(redis: Redis) -> None:
            redis.sadd(HOSTS, key)
            redis.set(key, row, px=int(LEASE * 1000))

        def live() -> None:
            told: set[str] = set()
            while True:
                self._try(say)
                for other in self.hosts():
                    if (differs := me.stranger(other)) and other.name not in told:
                        told.add(other.name)
                        console.warn(
                            f"{other.name} builds {package} too, but differs in {differs}: "
                            "neither has objects for the other"
                        )
                if ended.wait(RENEW):
                    return

        thread = threading.Thread(target=live, name="farm", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._try(lambda redis: redis.delete(key))

    def hosts(self) -> list[Host]:
        """Those that build now, by name; what makes no sense is passed over."""

        def look(redis: Redis) -> list[Any]:
            keys = list(redis.smembers(HOSTS))
            rows = list(redis.mget(keys)) if keys else []
            if gone := [key for key, row in zip(keys, rows, strict=True) if row is None]:
                redis.srem(HOSTS, *gone)
            return rows

        return sorted(filter(None, map(_host, self._try(look) or [])), key=lambda host: (host.name, host.package))

    def shares(self, build: str) -> Counter[str]:
        """How many objects of a build each host compiled."""
        return Counter(map(str, self._try(lambda redis: redis.hvals(_key((build, "")))) or []))

    def reached(self) -> None:
        """Nothing, if the server answers.

        Raises:
            VoltforgeError: it does not.
        """
        from redis import RedisError

        try:
            self._redis.ping()
        except (RedisError, OSError) as error:
            raise VoltforgeError(f"{self} does not answer ({error})", hint="redis-cli -h HOST ping") from error

    @cached_property
    def _redis(self) -> Redis:
        from redis import Redis  # a tenth of a second, for those who have a farm alone
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        return Redis.from_url(
            self.address, retry=Retry(NoBackoff(), 0), socket_timeout=PATIENCE, socket_connect_timeout=PATIENCE,
            decode_responses=True, encoding_errors="replace",
        )  # fmt: skip

    def _try(self, ask: Callable[[Redis], T]) -> T | None:
        """What the server says, or nothing where it does not answer; of one that fails too often nothing is asked."""
        from redis import RedisError

        if self._strikes >= STRIKES:
            return None
        try:
            said = ask(self._redis)
        except (RedisError, OSError, ValueError) as error:
            with self._counting:  # the gate asks, and so does the build
                self._strikes += 1
                out = self._strikes == STRIKES
            if out:
                console.warn(f"{self} does not say what other hosts compile ({error}): all is compiled here")
            return None
        self._strikes = 0
        return said


def named(package: str, made_with: Mapping[str, str]) -> str:
    """The name of a build, the same on all hosts that have objects for each other."""
    return files.digest([package, dict(made_with)])[:16]


def _key(one: Object) -> str:
    return ":".join((PREFIX, *one))


def _holder(claim: object) -> str:
    """Who holds a claim; nobody does of what is done."""
    return "" if claim is None or str(claim).startswith(MARK) else str(claim)


def _host(row: Any) -> Host | None:
    try:
        said: Any = json.loads(row or "")
        made_with = {str(name): str(value) for name, value in said["made_with"].items()}
        return Host(str(said["name"]), str(said["package"]), str(said["build"]), made_with)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
