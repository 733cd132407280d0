"""Hits and misses are read from ccache's own log."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from voltforge.compile import cache_stats
from voltforge.compile.cache_stats import CacheStats
from voltforge.compile.costs import Estimate, Estimates

STATS = """\
# /build/tree/csrc/a.cu
cache_miss
direct_cache_miss
# /build/tree/csrc/b.cu
direct_cache_hit
local_storage_hit
# /build/tree/build/CMakeFiles/CMakeScratch/TryCompile-3lI4wA/main.cu
cache_miss
# /build/tree/csrc/c.cpp
preprocessed_cache_hit
remote_storage_hit
"""


def test_hits_misses_and_seconds_are_read_from_ccaches_own_log(tmp_path):
    (tmp_path / "log").write_text(STATS)
    needs = Estimates(tmp_path / "needs.json", 1)
    for name, seconds in (("CMakeFiles/_C.dir/csrc/b.cu.o", 30), ("CMakeFiles/_C.dir/csrc/a.cu.o", 50)):
        needs.record(name, Estimate(seconds, 10**9))
    found = cache_stats.read(tmp_path / "log", needs)
    assert found == CacheStats(hits=2, misses=1, shared=1, saved=30.0)
    assert str(found) == "objects from the cache: 2 of 3, 1 of them from the server, 30 s of compiling saved"


@given(st.text())
def test_an_unreadable_ccache_log_counts_nothing(tmp_path_factory, text):
    log = tmp_path_factory.mktemp("log") / "log"
    log.write_text(text, errors="replace")
    assert cache_stats.read(log, None).saved == 0


def test_a_build_without_a_ccache_log_has_no_hits(tmp_path):
    assert cache_stats.read(tmp_path / "none", None) == CacheStats()
