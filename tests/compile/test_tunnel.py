"""The tunnel forwards both ways and knows whether the server answered."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from voltforge.compile import tunnel


@pytest.fixture
def carried() -> Iterator[tuple[socket.socket, socket.socket, Callable[[], bool]]]:
    """A client and a server with the tunnel between them, and its result after the client has left."""
    ask, one = socket.socketpair()
    other, answer = socket.socketpair()
    said: list[bool] = []
    thread = threading.Thread(target=lambda: said.append(tunnel.join(one, other)))
    thread.start()

    def gone() -> bool:
        ask.close()
        thread.join(30)
        return said[0]

    ask.sendall(b"question")
    assert answer.recv(100) == b"question"
    yield ask, answer, gone
    gone()
    answer.close()


def test_the_tunnel_forwards_both_ways(carried):
    ask, answer, gone = carried
    answer.sendall(b"answer")
    assert ask.recv(100) == b"answer"
    assert gone() is True
    assert answer.recv(100) == b""


def test_a_request_without_an_answer_counts_as_a_failure(carried):
    _, _, gone = carried
    assert gone() is False


def test_a_server_that_hangs_up_before_a_request_counts_as_a_failure():
    ask, one = socket.socketpair()
    other, answer = socket.socketpair()
    answer.close()
    with ask:
        assert tunnel.join(one, other) is False
