"""Units of several models on one device: each model is loaded once, and no unit waits forever."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.samples.turns import Turns


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_last_units_of_a_model_come_before_the_first_of_the_next_one() -> None:
    turns, order, begun, go_on = Turns(), [], threading.Event(), threading.Event()

    def work(name: str) -> None:
        with turns.turn(name[0]):
            order.append(name)
            begun.set()
            assert go_on.wait(60)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a1", "b1", "b2", "a2")]
    for number, thread in enumerate(threads):  # all but the first arrive while that one is drawn
        thread.start()
        assert begun.wait(60)
        wait_until(lambda number=number: len(turns._waiting) == number)  # type: ignore[misc]
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert order == ["a1", "a2", "b1", "b2"]


def test_only_one_unit_is_drawn_at_a_time_and_all_get_their_turn() -> None:
    turns, lock = Turns(), threading.Lock()
    order: list[str] = []

    def work(name: str) -> None:
        with turns.turn(name):
            assert lock.acquire(blocking=False), "two at a time"
            order.append(name)
            time.sleep(0.001)
            lock.release()

    names = [name for name in "abcd" for _ in range(6)]
    random.Random(0).shuffle(names)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, names))
    assert sorted(order) == sorted(names)


def test_a_unit_that_fails_leaves_its_place_to_the_next() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="no"), turns.turn("a"):
        raise ValueError("no")
    with turns.turn("b"):
        pass
