"""Measuring a server: against a real one on loopback, with tokens, failures and limits that are known beforehand."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.support.checkouts import ROOT
from tests.support.openai_server import Server, serving
from tests.support.servers import serving as serving_files
from voltforge.commands import server_benchmark
from voltforge.commands.server_benchmark import Load, Outcome, Percentiles, ServeError
from voltforge.system import console

TEXT = Load("text", concurrency=8, requests=40, earlier=100, new_tokens=12)
ALONE = replace(TEXT, name="alone", concurrency=1, requests=4)
DECISIONS = replace(TEXT, name="decisions", concurrency=20, requests=60, new_tokens=1, streamed=False,
                    unit="decisions/s")  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def paper(monkeypatch):
    """Return the printed output."""
    said = io.StringIO()
    monkeypatch.setattr(console, "screen", Console(file=said, highlight=False, soft_wrap=True, width=200))
    return said


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in server_benchmark.KEYS:
        monkeypatch.delenv(name, raising=False)


def measured(server: Server, load: Load = TEXT) -> server_benchmark.Measurement:
    """One load without the round that warms up, so that every request is one of it."""
    return server_benchmark.measure(server_benchmark.find(server.url), load, warm=False)


def unused() -> str:
    """An address at which nothing listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}"


# --- what is asked ---


@pytest.mark.parametrize("load", [TEXT, ALONE, DECISIONS], ids=lambda load: load.name)
def test_the_number_of_requests_and_the_concurrency_are_exact(load):
    with serving(delay=0.05 / load.new_tokens) as server:
        one = measured(server, load)
    assert len(server.asked) == len(one.outcomes) == load.requests
    assert server.most == load.concurrency
    assert one.errors == {}


def test_text_is_streamed_with_usage_and_a_decision_is_not():
    with serving() as server:
        measured(server, TEXT)
        measured(server, DECISIONS)
    texts, decisions = server.measured(12), server.measured(1)
    assert all(body["stream"] and body["stream_options"]["include_usage"] for body in texts)
    assert not any("stream" in body for body in decisions)
    assert all(body["ignore_eos"] for body in server.asked)


def test_no_two_prompts_share_a_prefix():
    with serving() as server:
        for _ in range(2):
            measured(server)
    starts = {" ".join(body["prompt"].split()[:16]) for body in server.asked}
    assert len(starts) == 2 * TEXT.requests


def test_the_warm_up_round_is_short_and_not_counted():
    with serving() as server:
        one = server_benchmark.measure(server_benchmark.find(server.url), TEXT)
    assert len(server.measured(server_benchmark.WARM_TOKENS)) == TEXT.concurrency
    assert len(server.measured(12)) == len(one.outcomes) == TEXT.requests


def test_the_first_model_is_the_default():
    with serving(models=("first", "second")) as server:
        assert server_benchmark.find(server.url).model == "first"
        assert server_benchmark.find(server.url, "second").model == "second"
        assert server_benchmark.find(server.url).version == "vllm 0.0.test"


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/v1", "{}/v1/"])
def test_the_address_may_be_written_with_v1_and_without_http(form):
    with serving() as server:
        assert server_benchmark.find(form.format(server.url)).url == server.url
        assert server_benchmark.find(form.format(server.url.removeprefix("http://"))).url == server.url


def test_the_api_key_is_sent_and_never_printed(tmp_path, monkeypatch, paper):
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    monkeypatch.setenv("VOLTFORGE_API_KEY", "sesame-7")
    with serving(key="sesame-7") as server:
        server_benchmark.check(server.url, tmp_path, loads=[replace(ALONE, requests=1)])
    assert server.keys == {"Bearer sesame-7"}
    assert "sesame" not in paper.getvalue() + (tmp_path / "serve.json").read_text()
    assert "sesame" not in repr(server_benchmark.BenchmarkedServer("http://x", "m", "sesame-7"))


# --- what is counted ---


@pytest.mark.parametrize("bundle", [1, 5])
def test_token_counts_of_the_server_are_used_for_any_chunking(bundle):
    with serving(bundle=bundle) as server:
        one = measured(server)
    assert (one.tokens, one.counted) == (40 * 12, "usage")
    assert one.prompt == TEXT.words


def test_chunks_are_counted_and_reported_without_server_counts(paper):
    with serving(usage=False) as server:
        one = measured(server)
        decisions = measured(server, DECISIONS)
    assert (one.tokens, one.counted) == (40 * 12, "chunks")
    assert (decisions.tokens, decisions.counted) == (60, "chunks")
    server_benchmark.report([one])
    assert "counted by us, as chunks" in paper.getvalue()
    assert "prompts of an unknown number of tokens" in paper.getvalue()


def test_a_stream_takes_as_long_as_its_tokens_and_its_first_one_comes_before_the_others():
    with serving(delay=0.01) as server:
        one = measured(server, ALONE)
    assert one.whole.p50 > 12 * 0.01
    assert one.whole.p50 > one.first.p50 > 0.01
    assert one.tokens_per_second < 1 / 0.01
    assert one.seconds > 4 * 12 * 0.01


def test_concurrent_requests_overlap():
    with serving(delay=0.02) as server:
        one = measured(server, replace(TEXT, concurrency=20))
    assert one.tokens_per_second > 2 / 0.02


def test_a_decision_has_no_time_to_first_token():
    with serving(delay=0.01) as server:
        one = measured(server, DECISIONS)
    assert one.first is None
    assert one.whole.p50 > 0.01
    assert one.figure == one.requests_per_second


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_measured_times_in_order(times):
    found = Percentiles.of(times)
    assert found.p50 <= found.p90 <= found.p99 <= max(times)
    assert {found.p50, found.p90, found.p99} <= set(times)


def test_percentiles_are_the_nearest_rank():
    assert Percentiles.of(range(100, 0, -1)) == Percentiles(50, 90, 99)
    assert Percentiles.of([7]) == Percentiles(7, 7, 7)
    assert Percentiles.of([]) is None


# --- what fails ---


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("fail_every", "status 500"),
        ("break_every", "ended early"),
        ("stop_every", "ended early"),
        ("error_every", "error in the stream"),
    ],
)
def test_failed_requests_are_counted_by_kind_without_their_tokens(fault, kind):
    with serving(**{fault: 5}) as server:
        one = measured(server)
    assert one.errors == {kind: 8}
    assert len(one.good) == 32
    assert one.tokens == 32 * 12
    assert one.requests_per_second == pytest.approx(32 / one.seconds)


def test_a_failed_decision_is_an_error():
    with serving(fail_every=3, status=503) as server:
        assert measured(server, DECISIONS).errors == {"status 503": 20}


def test_errors_are_counted_by_kind_the_most_frequent_first():
    with serving(fail_every=4, stop_every=5) as server:
        errors = measured(server).errors
    assert list(errors.items()) == [("status 500", 10), ("ended early", 6)]


def test_an_answer_without_tokens_is_an_error():
    with serving(empty=True) as server:
        one = measured(server)
    assert list(one.errors) == ["empty"]
    assert one.good == []
    assert (one.first, one.whole, one.tokens_per_second) == (None, None, 0)


def test_a_dead_server_stops_the_benchmark(paper):
    with serving(die_after=10) as server:
        one = measured(server, replace(TEXT, requests=300))
    assert len(one.good) == 10
    assert (
        server_benchmark.GIVE_UP <= len(one.outcomes) - 10 < 3 * server_benchmark.GIVE_UP
    )  # a late good one begins the count anew
    assert one.unasked == 300 - len(one.outcomes)
    server_benchmark.report([one])
    assert f"{one.unasked} not asked any more" in paper.getvalue()


def test_invalid_json_is_an_error_without_a_traceback():
    reader = server_benchmark._Reader(0)
    for line in (b"data: {", b"data: []", b"data: 7"):
        with pytest.raises(ValueError, match=r"."):
            reader.line(line)
    reader.line(b": a comment, as proxies send them\n")
    assert reader.ended().error == "ended early"


# --- sentences ---


def test_an_unreachable_server_fails_with_a_sentence():
    address = unused()
    with pytest.raises(ServeError, match=rf"^{address} cannot be reached: Connection refused") as caught:
        server_benchmark.find(address)
    assert "check that the server runs" in caught.value.hint


@pytest.mark.parametrize(("key", "said"), [("", "wants a key"), ("wrong", "does not accept the key")])
def test_a_missing_and_a_wrong_key_are_told_apart(key, said):
    with serving(key="right") as server, pytest.raises(ServeError, match=rf"{said} \(status 401\)") as caught:
        server_benchmark.find(server.url, key=key)
    assert "VOLTFORGE_API_KEY" in caught.value.hint


def test_an_unknown_model_is_refused_with_the_available_ones():
    with serving(models=("first", "second")) as server, pytest.raises(ServeError, match="has no model third") as caught:
        server_benchmark.find(server.url, "third")
    assert "first, second" in caught.value.hint


def test_another_kind_of_server_fails_with_a_sentence():
    with serving_files() as server:
        with pytest.raises(ServeError, match="not an OpenAI-compatible server: /v1/models gave status 404"):
            server_benchmark.find(server.url)
        server.files["/v1/models"] = b"<html>welcome</html>"
        with pytest.raises(ServeError, match="and no list of models"):
            server_benchmark.find(server.url)


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "http://x:port", "http://x:99999", "http://[::1"])
def test_an_invalid_address_fails_with_a_sentence(url):
    with pytest.raises(ServeError, match="is not the address of a server"):
        server_benchmark.find(url)


@pytest.mark.parametrize(
    ("status", "said"),
    [(500, "answers no request .*: status 500: told to fail"), (503, "is not ready"), (403, "wants a key")],
)
def test_a_silent_server_fails_before_the_measurement(tmp_path, status, said):
    with serving(fail_every=1, status=status) as server, pytest.raises(ServeError, match=said):
        server_benchmark.check(server.url, tmp_path, loads=[TEXT])
    assert server.measured(12) == []
    assert list(tmp_path.iterdir()) == []


# --- what is told ---


def test_the_table_compares_with_the_earlier_project(tmp_path, paper):
    with serving() as server:
        done = server_benchmark.check(server.url, tmp_path, loads=[TEXT, ALONE, DECISIONS])
    said = paper.getvalue()
    assert server_benchmark.EARLIER in said
    assert "100 tok/s" in said
    assert "100 decisions/s" in said
    kept = json.loads((tmp_path / "serve.json").read_text())
    assert (kept["url"], kept["model"], kept["server"]) == (server.url, "small", "vllm 0.0.test")
    assert [measurement["name"] for measurement in kept["measurements"]] == ["text", "alone", "decisions"]
    assert [measurement["tokens_per_second"] for measurement in kept["measurements"]] == [
        one.tokens_per_second for one in done
    ]
    assert kept["measurements"][0]["whole"]["p99"] == done[0].whole.p99
    assert (tmp_path / "serve.png").read_bytes().startswith(PNG)


def test_results_before_a_failure_are_printed_and_stored(tmp_path, paper):
    with serving(die_after=8 + 40) as server:  # the first load with its warming round
        with pytest.raises(ServeError, match=r"answers no request \(decisions\)"):
            server_benchmark.check(server.url, tmp_path, loads=[TEXT, DECISIONS])
    assert "40 answers in" in paper.getvalue()
    assert [
        measurement["ended_well"] for measurement in json.loads((tmp_path / "serve.json").read_text())["measurements"]
    ] == [40]
    assert (tmp_path / "serve.png").exists()


def test_results_before_ctrl_c_are_printed_and_stored(tmp_path, paper):
    def interrupted():
        yield ALONE
        raise KeyboardInterrupt

    with serving() as server, pytest.raises(KeyboardInterrupt):
        server_benchmark.check(server.url, tmp_path, loads=interrupted())
    assert "4 answers in" in paper.getvalue()
    assert (tmp_path / "serve.json").exists()


def test_failed_requests_are_reported_and_fail_the_command(tmp_path, paper):
    with serving(fail_every=6) as server, pytest.raises(ServeError, match=r"text: 7 status 500, of 40"):
        server_benchmark.check(server.url, tmp_path, loads=[TEXT])
    assert "told to fail" in paper.getvalue()
    assert json.loads((tmp_path / "serve.json").read_text())["measurements"][0]["errors"] == {"status 500": 7}


def test_a_saturated_client_is_reported(paper):
    server_benchmark.report([server_benchmark.Measurement(TEXT, (Outcome(1.0, 0.1, 12),), seconds=1.0, busy=0.95)])
    assert "the server may be faster than this" in paper.getvalue()


def test_a_load_without_successes_is_reported_and_plotted(tmp_path):
    nothing = server_benchmark.Measurement(TEXT, (Outcome(1.0, error="timeout"),), seconds=1.0, busy=0)
    server_benchmark.report([nothing])
    server_benchmark.keep(server_benchmark.BenchmarkedServer("http://x", "m"), [nothing], tmp_path)
    assert json.loads((tmp_path / "serve.json").read_text())["measurements"][0]["whole"] is None


# --- the command line ---


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in server_benchmark.KEYS}
    return subprocess.run(
        [sys.executable, "bench/serve.py", *words], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60
    )


def test_the_command_writes_table_json_and_plot(tmp_path):
    with serving() as server:
        done = bench("--url", server.url, "--requests", "3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(server.measured(128)) == 3 * 3
    assert len(server.measured(1)) == 3 + 3
    assert {path.name for path in tmp_path.iterdir()} == {"serve.json", "serve.png"}


def test_the_command_fails_with_one_line_and_status_1(tmp_path):
    done = bench("--url", unused(), "--quick", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stdout.startswith("x http://127.0.0.1:")
    assert "Traceback" not in done.stdout + done.stderr
