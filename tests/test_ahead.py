"""Work by threads ahead of whoever wants it."""

import threading
import time

import pytest

from library.ahead import ahead


def test_results_come_in_order_whichever_is_done_first():
    def slow(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number

    assert list(ahead(slow, range(20), threads=4)) == list(range(20))


def test_no_more_is_begun_than_may_wait():
    begun: list[int] = []
    results = ahead(begun.append, range(100), threads=2, waiting=5)
    next(results)
    time.sleep(0.1)
    assert len(begun) <= 6
    results.close()


def test_several_at_once():
    together = threading.Barrier(3, timeout=10)
    assert len(list(ahead(lambda _: together.wait(), range(3), threads=3))) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whoever_is_broken_off_stops_the_work(error):
    """Promptly: what has begun is waited for, nothing else is begun."""
    begun: list[int] = []

    def slow(number: int) -> None:
        begun.append(number)
        time.sleep(0.05)

    def break_off() -> None:
        for _ in ahead(slow, range(1000), threads=2, waiting=100):
            raise error

    before = threading.active_count()
    with pytest.raises(error):
        break_off()
    count = len(begun)
    time.sleep(0.15)
    assert len(begun) == count < 10
    assert threading.active_count() == before


def test_an_error_comes_in_its_place_and_stops_the_work():
    begun: list[int] = []

    def broken(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise LookupError("number 3")
        return number

    results = ahead(broken, range(1000), threads=1, waiting=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LookupError, match="number 3"):
        next(results)
    assert len(begun) < 10


def test_threads_begin_with_a_start_of_their_own():
    names: list[str] = []
    start = threading.local()

    def begin(name: str) -> None:
        start.name = name
        names.append(name)

    assert set(ahead(lambda _: start.name, range(8), 2, start=begin, start_with=("ready",))) == {"ready"}
    assert 1 <= len(names) <= 2
