"""Two processes, of which one fails: in a job, and at last where the other does not."""

from __future__ import annotations

from alro_fast.cli import run
from alro_fast.errors import AlroFastError
from alro_fast.processes.dealing import after_the_first, dealing, dealt, place, told


def job(number: int) -> int:
    if number == 3:
        raise AlroFastError("job 3 is bad")
    return number


def odd(number: int) -> float:
    if place().number:
        raise AssertionError("within a job a process is alone")
    return 1 / number


def main(_) -> None:
    with dealing("cpu"):
        assert place().processes == 2
        assert told(place().number) == 0
        assert dealt([5, 6, 7], [1, 2, 1], lambda each: each) == [5, 6, 7]
        assert dealt([], [], job) == []
        try:
            dealt([0, 1, 2, 3], [1, 1, 1, 1], job)
        except AlroFastError as error:
            print(f"all know: {error}")
        try:
            dealt([1, 0], [2, 1], odd)  # the second has the second
        except (AlroFastError, ZeroDivisionError) as error:
            print(f"all know: {error}")
        done: list[int] = []
        try:
            after_the_first(lambda: done.append(place().number))
            after_the_first(lambda: done.append(job(3) if place().number == 0 else 9))
        except AlroFastError as error:
            assert done == [place().number]  # the second process did not begin
            print(f"all know, before they begin: {error}")
        if place().number == 1:
            raise AlroFastError("there is no room in process 1")
        dealt([1, 2], [1, 1], job)
        raise AssertionError("nobody comes to this")


if __name__ == "__main__":
    run(main, [])
