"""The critical path of a graph of commands, and its time with any number of jobs."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from voltforge.compile.command_graph import CommandGraph


@st.composite
def graphs(draw: st.DrawFn) -> CommandGraph:
    durations = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=30))
    earlier = [
        st.frozensets(st.integers(0, number - 1), max_size=3) if number else st.just(frozenset[int]())
        for number in range(len(durations))
    ]
    return CommandGraph(tuple(durations), draw(st.tuples(*earlier)))


@given(graph=graphs(), jobs=st.integers(1, 70))
def test_makespan_is_within_its_theoretical_bounds(graph, jobs):
    work, span = sum(graph.durations), graph.makespan(jobs)
    assert max(*graph.durations, graph.critical_time, work / jobs) <= span <= work
    assert span * jobs <= work + (jobs - 1) * graph.critical_time  # Graham's bound for a list schedule


@given(graph=graphs())
def test_one_job_takes_the_sum_and_many_jobs_take_the_critical_path(graph):
    assert graph.makespan(1) == sum(graph.durations)
    critical_time = sum(graph.durations[command] for command in graph.critical_path)
    assert graph.makespan(len(graph.durations)) == critical_time == max(graph.chains) == graph.critical_time
    assert all(before in graph.dependencies[after] for before, after in pairwise(graph.critical_path))


def test_longest_command_starts_first():
    independent = frozenset[int]()
    assert CommandGraph((1, 1, 1, 1, 4), (independent,) * 5).makespan(2) == 4
    assert CommandGraph((3, 3, 2, 2, 2), (independent,) * 5).makespan(2) == 7  # a list schedule is not always optimal
