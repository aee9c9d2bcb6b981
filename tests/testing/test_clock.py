"""FakeClock: no real waiting, and the order of deadlines."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from llmkit.testing import FakeClock


def test_it_is_a_clock_with_a_seed() -> None:
    clock = FakeClock(start=1000.0, seed=7)
    again = FakeClock(seed=7)
    assert clock.now() == 0.0
    assert clock.time() == 1000.0
    numbers = [clock.random() for _ in range(3)]
    assert numbers == [again.random() for _ in range(3)]
    assert numbers != [FakeClock(seed=8).random() for _ in range(3)]
    assert all(0 <= number < 1 for number in numbers)


def test_sleep_takes_no_real_time_and_is_recorded() -> None:
    clock = FakeClock()

    async def main() -> None:
        await clock.sleep(86_400)
        await clock.sleep(0)
        await clock.sleep(-1)
        await clock.sleep(0.5)

    before = time.perf_counter()
    asyncio.run(main())
    assert time.perf_counter() - before < 1
    assert clock.now() == 86_400.5
    assert clock.time() == 1_767_225_600.0 + 86_400.5
    assert clock.sleeps == [86_400, 0, -1, 0.5]


def test_sleepers_wake_in_the_order_of_their_deadlines() -> None:
    clock = FakeClock()
    woken: list[tuple[float, float]] = []

    async def sleeper(seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((seconds, clock.now()))
        await clock.sleep(seconds)
        woken.append((seconds, clock.now()))

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for seconds in (7, 2, 3):
                group.create_task(sleeper(seconds))

    asyncio.run(main())
    assert woken == [(2, 2), (3, 3), (2, 4), (3, 6), (7, 7), (7, 14)]


def test_equal_deadlines_keep_their_order() -> None:
    clock = FakeClock()
    woken: list[int] = []

    async def sleeper(number: int) -> None:
        await clock.sleep(1)
        woken.append(number)

    async def main() -> None:
        await asyncio.gather(*(sleeper(number) for number in range(5)))

    asyncio.run(main())
    assert woken == [0, 1, 2, 3, 4]


def test_timers_fire_before_the_sleeper_they_precede_and_what_they_wake_runs_first() -> None:
    clock = FakeClock()
    seen: list[tuple[str, float]] = []

    async def main() -> None:
        event = asyncio.Event()

        async def waiter() -> None:
            await event.wait()
            await asyncio.sleep(0)
            seen.append(("woken", clock.now()))

        task = asyncio.create_task(waiter())
        clock.call_later(2, lambda: seen.append(("second", clock.now())))
        clock.call_later(1, event.set)
        forgotten = clock.call_later(1.5, lambda: seen.append(("never", clock.now())))
        forgotten.cancel()
        forgotten.cancel()
        await clock.sleep(3)
        seen.append(("slept", clock.now()))
        await task

    asyncio.run(main())
    assert seen == [("woken", 1), ("second", 2), ("slept", 3)]


def test_a_timer_alone_does_not_make_time_run() -> None:
    clock = FakeClock()

    async def main() -> None:
        fired = asyncio.Event()
        clock.call_later(1, fired.set)
        await clock.settle()
        assert clock.now() == 0
        assert not fired.is_set()
        await clock.advance(1)
        assert fired.is_set()

    asyncio.run(main())
    assert clock.now() == 1


def test_time_stops_where_a_timer_cancels_the_sleeper() -> None:
    clock = FakeClock()

    async def main() -> None:
        task = asyncio.create_task(clock.sleep(100))
        clock.call_later(30, task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task
        await clock.settle()
        assert clock.now() == 30
        assert clock.sleeping == 0
        await clock.sleep(1)  # and the clock still goes
        assert clock.now() == 31
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_an_endless_sleep_lets_timers_fire_even_those_set_later() -> None:
    clock = FakeClock()

    async def main() -> None:
        task = asyncio.create_task(clock.sleep(math.inf))
        await clock.settle()
        assert clock.now() == 0
        clock.call_later(5, task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert clock.now() == 5


def test_a_failing_timer_is_reported_and_the_clock_goes_on() -> None:
    clock = FakeClock()
    reports: list[dict[str, object]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reports.append(context))
        clock.call_later(1, lambda: 1 / 0)
        await clock.sleep(2)

    asyncio.run(main())
    assert isinstance(reports[0]["exception"], ZeroDivisionError)
    assert clock.now() == 2


def test_by_hand_time_stands_until_advanced() -> None:
    clock = FakeClock(auto=False)
    woken: list[float] = []

    async def sleeper(seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(clock.now())

    async def main() -> None:
        tasks = [asyncio.create_task(sleeper(seconds)) for seconds in (10, 4, 6)]
        await clock.settle()
        assert (clock.sleeping, woken) == (3, [])
        await clock.advance(5)
        assert (clock.sleeping, woken, clock.now()) == (2, [4], 5)
        await clock.advance(0.5)
        assert woken == [4]
        await clock.advance(10)
        assert (woken, clock.now()) == ([4, 6, 10], 15.5)
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_advance_reaches_what_is_set_on_the_way() -> None:
    clock = FakeClock(auto=False)
    ticks: list[float] = []

    async def ticker() -> None:
        while True:
            await clock.sleep(1)
            ticks.append(clock.now())

    async def main() -> None:
        task = asyncio.create_task(ticker())
        await clock.advance(3.5)
        task.cancel()

    asyncio.run(main())
    assert ticks == [1, 2, 3]


def test_one_clock_serves_one_loop_after_another() -> None:
    clock = FakeClock()

    async def leave_things_behind() -> None:
        clock.call_later(1, lambda: pytest.fail("the loop of this timer is gone"))
        task = asyncio.create_task(clock.sleep(50))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave_things_behind())
    asyncio.run(clock.sleep(10))
    assert clock.now() == 10


def test_two_threads_share_a_clock() -> None:
    clock = FakeClock()

    async def main() -> None:
        async def there() -> None:
            await asyncio.gather(*(clock.sleep(second) for second in range(1, 20)))

        await asyncio.wait_for(
            asyncio.gather(*(asyncio.to_thread(asyncio.run, there()) for _ in range(4)), there()),
            timeout=10,
        )

    asyncio.run(main())
    assert clock.sleeping == 0
    assert clock.now() >= 19
