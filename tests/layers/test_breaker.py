"""llmkit.layers.breaker: when it opens, what it lets through, how it closes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

import llmkit
from llmkit import errors
from llmkit.circuit import CircuitState
from llmkit.config import BreakerSettings
from llmkit.events import CircuitChanged
from llmkit.layers.breaker import Breaker, Breakers
from llmkit.state.circuits import MemoryCircuits, SQLiteCircuits
from llmkit.state.owner import current_owner
from llmkit.state.sqlite import SQLiteStore
from llmkit.testing import FakeClock, Fault, Simulator
from tests.layers.script import HANG, Script, call_for, chain, endpoint, outcomes, run

DOWN = errors.ProviderOverloaded("503", status=503)


def made(clock: FakeClock, **settings: float) -> tuple[Breakers, Breaker]:
    breakers = Breakers(BreakerSettings(**settings), clock)
    return breakers, Breaker(breakers)


async def times(n: int, layer: Breaker, clock: FakeClock, step: object) -> list[BaseException | None]:
    below = Script(clock, step)
    return [(await outcomes(chain(layer, below), call_for(clock)))[1] for _ in range(n)]


def test_five_failures_in_a_row_open_it_and_nothing_is_sent_any_more() -> None:
    async def main() -> None:
        clock, events = FakeClock(), []
        breakers, layer = made(clock)
        assert await times(4, layer, clock, DOWN) == [DOWN] * 4
        assert breakers.of(endpoint()).state == "closed"
        below = Script(clock, DOWN)
        await outcomes(chain(layer, below), call_for(clock, events=events))
        assert [(e.before, e.after) for e in events if isinstance(e, CircuitChanged)] == [("closed", "open")]
        _, refused, seen = await outcomes(chain(layer, below), call_for(clock))
        assert isinstance(refused, errors.CircuitOpen)
        assert refused.retry_after == 60
        assert "503" in refused.message
        assert seen == ["failed"]
        assert len(below.calls) == 1

    run(main)


def test_a_failure_rate_over_the_window_opens_it_too() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock, failures=100, rate=0.5, minimum_calls=5, window_s=60)
        for step in (["ok"], DOWN, ["ok"], DOWN):  # half of them fail, but four calls prove nothing
            await times(1, layer, clock, step)
        assert breakers.of(endpoint()).state == "closed"
        await times(1, layer, clock, DOWN)
        assert breakers.of(endpoint()).state == "open"

    run(main)


def test_failures_older_than_the_window_are_forgotten() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock, failures=100, rate=0.5, minimum_calls=5, window_s=60)
        for _ in range(4):
            await times(1, layer, clock, DOWN)
        await clock.sleep(61)
        await times(4, layer, clock, ["ok"])
        await times(1, layer, clock, DOWN)
        assert breakers.of(endpoint()).state == "closed"

    run(main)


def test_half_open_lets_one_probe_through_and_two_successes_close_it() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        await times(5, layer, clock, DOWN)
        await clock.sleep(60)
        slow = Script(clock, ["a", "b"])
        probe = await chain(layer, slow)(call_for(clock))  # at its first token, not at its end
        circuit = breakers.of(endpoint())
        assert circuit.state == "half_open"
        (second,) = await times(1, layer, clock, ["ok"])
        assert isinstance(second, errors.CircuitOpen)
        assert second.state == "half_open"
        await probe.read()
        assert circuit.state == "half_open"
        assert await times(1, layer, clock, ["ok"]) == [None]
        assert circuit.state == "closed"

    run(main)


def test_a_failed_probe_opens_it_again() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        await times(5, layer, clock, DOWN)
        await clock.sleep(60)
        await times(1, layer, clock, DOWN)
        circuit = breakers.of(endpoint())
        assert circuit.state == "open"
        assert circuit.retry_after == 60

    run(main)


def test_a_cancelled_probe_gives_its_place_back() -> None:
    async def main() -> None:
        clock = FakeClock(auto=False)
        _, layer = made(clock)
        await times(5, layer, clock, DOWN)
        await clock.advance(60)
        hanging = asyncio.create_task(chain(layer, Script(clock, HANG))(call_for(clock)))
        await clock.settle()
        assert isinstance((await times(1, layer, clock, ["ok"]))[0], errors.CircuitOpen)
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
        assert await times(2, layer, clock, ["ok"]) == [None, None]

    run(main)


def test_sustained_429_opens_it_for_as_long_as_the_server_asks() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        await times(5, layer, clock, errors.ProviderRateLimited("429", retry_after=300.0))
        assert breakers.of(endpoint()).retry_after == 300
        breakers.reset()
        await times(5, layer, clock, errors.ProviderRateLimited("429", retry_after=1e9))
        assert breakers.of(endpoint()).retry_after == 600

    run(main)


@pytest.mark.parametrize(
    "step",
    [
        errors.InvalidRequest("400"),
        errors.AuthenticationError("401"),
        errors.Refused("no", reason="no"),
        errors.EmptyReply("nothing"),
        errors.ContextTooLong("long", tokens=1, window=1),
        errors.QuotaExhausted("no credit"),
        errors.BudgetExceeded("cap", scope="request", limit=1, needed=2),
        ValueError("foreign"),
    ],
)
def test_what_does_not_say_that_the_endpoint_is_unwell_does_not_open_it(step: Exception) -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        await times(20, layer, clock, step)
        assert breakers.of(endpoint()).state == "closed"

    run(main)


@pytest.mark.parametrize("error", [errors.StreamBroken("cut"), errors.IdleTimeout("silence", limit=3)])
def test_a_stream_that_breaks_counts(error: Exception) -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        await times(5, layer, clock, ["a", error])
        assert breakers.of(endpoint()).state == "open"

    run(main)


def test_a_success_between_failures_starts_the_count_anew() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock, rate=1.0)
        await times(4, layer, clock, DOWN)
        await times(1, layer, clock, ["ok"])
        await times(4, layer, clock, DOWN)
        assert breakers.of(endpoint()).state == "closed"

    run(main)


def test_isolated_by_hand_until_reset_by_hand() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        breakers.of(endpoint()).isolate()
        await clock.sleep(1e6)
        (refused,) = await times(1, layer, clock, ["ok"])
        assert refused.state == "isolated"
        assert refused.retry_after is None
        breakers.of(endpoint()).reset()
        assert await times(1, layer, clock, ["ok"]) == [None]

    run(main)


def test_each_endpoint_has_its_own() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        await times(5, layer, clock, DOWN)
        other = endpoint("other")
        _, raised, _ = await outcomes(chain(layer, Script(clock, ["ok"])), call_for(clock, other))
        assert raised is None
        assert [circuit.state for circuit in breakers] == ["open", "closed"]

    run(main)


def test_a_straggler_of_an_earlier_era_says_nothing() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers, layer = made(clock)
        straggler = await chain(layer, Script(clock, ["a", DOWN]))(call_for(clock))
        await times(5, layer, clock, DOWN)
        breakers.reset()
        with pytest.raises(errors.ProviderOverloaded):
            await straggler.read()
        assert breakers.of(endpoint()).failures_in_row == 0

    run(main)


# -- shared --------------------------------------------------------------------------------------------------------------


class Counted(MemoryCircuits):
    """What several breakers share; it counts the reads, and can be out of reach."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.reads = 0
        self.away = False

    async def read(self, endpoint: str) -> CircuitState | None:
        self.reads += 1
        self._ask()
        return await super().read(endpoint)

    async def write(self, state: CircuitState) -> bool:
        self._ask()
        return await super().write(state)

    async def claim_probe(self, endpoint: str, owner: str, until: float, probes: int) -> bool:
        self._ask()
        return await super().claim_probe(endpoint, owner, until, probes)

    def _ask(self) -> None:
        if self.away:
            raise errors.StoreError("the store is away")


class Slow(Counted):
    """A store to which every question takes a turn of the loop, as over a network."""

    async def read(self, endpoint: str) -> CircuitState | None:
        await asyncio.sleep(0)
        return await super().read(endpoint)

    async def write(self, state: CircuitState) -> bool:
        await asyncio.sleep(0)
        return await super().write(state)

    async def claim_probe(self, endpoint: str, owner: str, until: float, probes: int) -> bool:
        claimed = await super().claim_probe(endpoint, owner, until, probes)
        await asyncio.sleep(0)
        return claimed


@pytest.fixture(params=["memory", "slow", "sqlite"])
def kernels(request, tmp_path):
    """Makes breakers as kernels have them that share a store, all on one clock that stands until it is advanced."""
    clock = FakeClock(auto=False)
    memory = Slow(clock) if request.param == "slow" else Counted(clock)
    stores = []

    def kernel(**settings: float) -> tuple[Breakers, Breaker]:
        shared = memory
        if request.param == "sqlite":
            store = SQLiteStore(tmp_path / "ledger.sqlite3")
            stores.append(store)
            shared = SQLiteCircuits(lambda: store.database, clock)
        breakers = Breakers(BreakerSettings(**settings), clock, shared, current_owner)
        return breakers, Breaker(breakers)

    kernel.clock = clock
    yield kernel
    for store in stores:
        store.close()


def test_what_opened_in_one_kernel_is_open_in_the_other_within_a_second(kernels) -> None:
    async def main() -> None:
        clock, events = kernels.clock, []
        (one, first), (two, second) = kernels(), kernels()
        assert await times(1, second, clock, ["ok"]) == [None]
        await times(5, first, clock, DOWN)
        await clock.advance(1)
        below = Script(clock, ["ok"])
        _, refused, _ = await outcomes(chain(second, below), call_for(clock, events=events))
        assert isinstance(refused, errors.CircuitOpen)
        assert (refused.state, refused.retry_after) == ("open", 59)
        assert "503" in refused.message
        assert not below.calls
        assert [(e.before, e.after) for e in events if isinstance(e, CircuitChanged)] == [("closed", "open")]
        assert [c.failures_in_row for c in (one.of(endpoint()), two.of(endpoint()))] == [5, 5]
        third, _ = kernels()  # a kernel that starts only now, and has not used it
        assert [(c.endpoint.name, c.state, c.retry_after) for c in third] == [("test:m", "open", 59)]

    run(main)


def test_a_plan_knows_what_another_kernel_knows_and_changes_nothing(kernels) -> None:
    async def main() -> None:
        clock = kernels.clock
        (one, first), (two, _) = kernels(), kernels()
        assert await two.plan(endpoint()) is None
        await times(5, first, clock, DOWN)
        refusal = await two.plan(endpoint())
        assert isinstance(refusal, errors.CircuitOpen)
        assert (refusal.state, refusal.endpoint) == ("open", "test:m")
        assert two._named == {}
        await clock.advance(60)
        assert await two.plan(endpoint()) is None, "it is due for a probe"
        assert one.of(endpoint()).state == "open"
        one.of(endpoint()).isolate()
        assert (await two.plan(endpoint())).state == "isolated"

    run(main)


def test_the_simulator_is_each_kernels_own_and_so_is_its_circuit(kernels) -> None:
    async def main() -> None:
        clock, simulated = kernels.clock, endpoint(simulated=True)
        (one, first), (two, second) = kernels(), kernels()
        for _ in range(5):
            await outcomes(chain(first, Script(clock, DOWN)), call_for(clock, simulated))
        await clock.advance(1)
        assert one.of(simulated).state == "open"
        _, error, _ = await outcomes(chain(second, Script(clock, ["ok"])), call_for(clock, simulated))
        assert error is None
        assert two.of(simulated).state == "closed"
        await clock.advance(60)
        for _ in range(2):
            assert (await outcomes(chain(first, Script(clock, ["ok"])), call_for(clock, simulated)))[1] is None
        assert one.of(simulated).state == "closed"

    run(main)


def test_probes_are_limited_over_all_kernels_and_their_successes_counted_together(kernels) -> None:
    async def main() -> None:
        clock = kernels.clock
        (one, first), (two, second) = kernels(), kernels()
        await times(5, first, clock, DOWN)
        await clock.advance(60)
        probe = await chain(first, Script(clock, ["a", "b"]))(call_for(clock))
        (refused,) = await times(1, second, clock, ["ok"])
        assert isinstance(refused, errors.CircuitOpen)
        assert refused.state == "half_open"
        await probe.read()
        assert await times(1, second, clock, ["ok"]) == [None]  # the second success, of two
        assert two.of(endpoint()).state == "closed"
        await clock.advance(1)
        assert await times(2, first, clock, ["ok"]) == [None, None]
        assert one.of(endpoint()).state == "closed"

    run(main)


def test_a_failed_probe_opens_it_for_all(kernels) -> None:
    async def main() -> None:
        clock = kernels.clock
        (_, first), (_, second) = kernels(), kernels()
        await times(5, first, clock, DOWN)
        await clock.advance(61)
        assert await times(1, second, clock, DOWN) == [DOWN]
        (refused,) = await times(1, first, clock, ["ok"])
        assert (refused.state, refused.retry_after) == ("open", 60)

    run(main)


def test_a_cancelled_probe_gives_its_place_to_another_kernel(kernels) -> None:
    async def main() -> None:
        clock = kernels.clock
        (_, first), (_, second) = kernels(), kernels()
        await times(5, first, clock, DOWN)
        await clock.advance(60)
        for turns in range(30):  # cancelled at whatever moment of its way
            hanging = asyncio.create_task(chain(first, Script(clock, HANG))(call_for(clock)))
            for _ in range(turns):
                await asyncio.sleep(0)
            hanging.cancel()
            await asyncio.gather(hanging, return_exceptions=True)
        await clock.advance(1)
        assert await times(2, second, clock, ["ok"]) == [None, None]

    run(main)


def test_what_is_done_by_hand_holds_for_all(kernels) -> None:
    async def main() -> None:
        clock = kernels.clock
        (one, first), (two, second) = kernels(), kernels()
        await times(1, first, clock, ["ok"])
        two.of(endpoint()).isolate()
        await clock.advance(1)
        (refused,) = await times(1, first, clock, ["ok"])
        assert refused.state == "isolated"
        await clock.advance(1e6)
        assert [circuit.state for circuit in kernels()[0]] == ["isolated"], "nobody has reset it"
        one.reset()
        assert await times(1, first, clock, ["ok"]) == [None]
        await clock.advance(1)
        assert await times(1, second, clock, ["ok"]) == [None]

    run(main)


def test_a_reset_closes_what_another_kernel_opened_though_it_was_never_used_here(kernels) -> None:
    async def main() -> None:
        clock = kernels.clock
        _, first = kernels()
        await times(5, first, clock, DOWN)
        kernels()[0].reset()
        await clock.advance(1)
        assert await times(1, first, clock, ["ok"]) == [None]

    run(main)


def test_a_reset_comes_after_what_others_did_before_they_knew_of_it(kernels) -> None:
    async def main() -> None:
        clock = kernels.clock
        (one, first), (two, second) = kernels(), kernels()
        for layer in (first, second):
            await times(1, layer, clock, ["ok"])
        await times(5, first, clock, DOWN)
        two.of(endpoint()).reset()  # it has not heard yet that it is open
        await clock.advance(1)
        assert await times(1, first, clock, ["ok"]) == [None]
        assert [c.state for c in (one.of(endpoint()), two.of(endpoint()))] == ["closed", "closed"]

    run(main)


def test_two_that_open_it_at_once_agree(kernels) -> None:
    async def main() -> None:
        clock = kernels.clock
        (one, first), (two, second) = kernels(), kernels(open_s=30)
        await asyncio.gather(*[times(5, layer, clock, DOWN) for layer in (first, second)])
        await clock.advance(1)
        for layer in (first, second):
            (refused,) = await times(1, layer, clock, ["ok"])
            assert refused.state == "open"
        assert one.of(endpoint()).retry_after == two.of(endpoint()).retry_after

    run(main)


def test_what_nobody_has_tried_again_for_long_is_forgotten(kernels) -> None:
    async def main() -> None:
        clock = kernels.clock
        _, first = kernels()
        await times(5, first, clock, DOWN)
        await clock.advance(60 + 601)
        later, layer = kernels()
        assert list(later) == []
        calls = [times(1, layer, clock, ["ok"]) for _ in range(5)]
        assert await asyncio.gather(*calls) == [[None]] * 5  # and not one probe at a time

    run(main)


def test_clocks_that_differ_agree_on_when_it_reopens() -> None:
    async def main() -> None:
        ours, theirs = FakeClock(start=1000.0, auto=False), FakeClock(start=500.0, auto=False)
        await theirs.advance(510)  # another kernel, which has run longer, and whose clock is 10 s ahead
        shared = MemoryCircuits(ours)
        one, two = Breakers(BreakerSettings(), ours, shared), Breakers(BreakerSettings(), theirs, shared)
        await times(5, Breaker(one), ours, DOWN)
        (refused,) = await times(1, Breaker(two), theirs, ["ok"])
        assert refused.retry_after == 50

    run(main)


@pytest.mark.parametrize("step", [-86_400.0, 86_400.0])
def test_a_clock_that_is_put_right_keeps_nothing_open_for_ever(step) -> None:
    async def main() -> None:
        before, after = FakeClock(start=1e9, auto=False), FakeClock(start=1e9 + step, auto=False)
        shared = MemoryCircuits(before)
        await times(5, Breaker(Breakers(BreakerSettings(), before, shared)), before, DOWN)
        shared._clock = after
        layer = Breaker(Breakers(BreakerSettings(), after, shared))
        await times(1, layer, after, ["ok"])
        await after.advance(601)
        assert await times(2, layer, after, ["ok"]) == [None, None]
        assert await times(1, layer, after, ["ok"]) == [None]

    run(main)


def test_while_all_is_well_the_store_is_looked_at_once_a_second() -> None:
    async def main() -> None:
        clock = FakeClock(auto=False)
        shared = Counted(clock)
        layer = Breaker(Breakers(BreakerSettings(), clock, shared))
        assert await times(100, layer, clock, ["ok"]) == [None] * 100
        assert shared.reads == 1
        await clock.advance(1)
        await times(100, layer, clock, ["ok"])
        assert shared.reads == 2
        assert await shared.read_all() == []

    run(main)


def test_without_its_store_each_kernel_goes_by_what_it_knows_and_says_so_once(caplog) -> None:
    async def main() -> None:
        clock = FakeClock(auto=False)
        shared = Counted(clock)
        one, two = (Breakers(BreakerSettings(), clock, shared) for _ in range(2))
        first, second = Breaker(one), Breaker(two)
        shared.away = True
        await times(5, first, clock, DOWN)
        assert isinstance((await times(1, first, clock, ["ok"]))[0], errors.CircuitOpen)
        assert await times(1, second, clock, ["ok"]) == [None]
        assert shared.reads <= 2, "it is not asked at every call"
        await clock.advance(60)
        probe = await chain(first, Script(clock, ["a", "b"]))(call_for(clock))
        assert isinstance((await times(1, first, clock, ["ok"]))[0], errors.CircuitOpen)
        await probe.read()
        assert await times(1, first, clock, DOWN) == [DOWN]
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2, "once a kernel"
        shared.away = False
        await clock.advance(11)
        await times(1, first, clock, ["ok"])
        (refused,) = await times(1, second, clock, ["ok"])
        assert (refused.state, refused.retry_after) == ("open", 49), "what was not shared then is shared now"
        shared.away = True
        one.reset()
        assert len(caplog.records) == 3, "and the next time it is said again"
        shared.away = False
        await one.aclose()
        await clock.advance(1)
        assert await times(1, second, clock, ["ok"]) == [None]

    run(main)


def test_a_store_that_was_begun_anew_is_told_what_is_open() -> None:
    async def main() -> None:
        clock = FakeClock(auto=False)
        shared = Counted(clock)
        first, second = (Breaker(Breakers(BreakerSettings(), clock, shared)) for _ in range(2))
        await times(5, first, clock, DOWN)
        shared._states.clear()
        await clock.advance(1)
        await times(1, first, clock, ["ok"])
        (refused,) = await times(1, second, clock, ["ok"])
        assert (refused.state, refused.retry_after) == ("open", 59)

    run(main)


def test_no_key_and_no_password_gets_into_the_store() -> None:
    async def main() -> None:
        clock = FakeClock(auto=False)
        shared = MemoryCircuits(clock)
        layer = Breaker(Breakers(BreakerSettings(failures=1), clock, shared))
        secret = "sk-verysecret0123456789"
        at = replace(endpoint(), base_url=f"https://ana:{secret}@host/v1?token={secret}")
        error = errors.ProviderOverloaded(f"503 for Bearer {secret} " + "x" * 1000)
        await outcomes(chain(layer, Script(clock, error)), call_for(clock, at))
        (state,) = await shared.read_all()
        assert state.state == "open"
        assert secret not in repr(state)
        assert len(state.last_failure) <= 300

    run(main)


PROBER = """
import asyncio, sys
from pathlib import Path
from llmkit.layers.breaker import Breaker, Breakers
from llmkit.config import BreakerSettings
from llmkit.state.circuits import SQLiteCircuits
from llmkit.state.owner import current_owner
from llmkit.state.sqlite import SQLiteStore
from llmkit.testing import FakeClock
from tests.layers.script import HANG, Script, call_for, chain
from tests.layers.test_breaker import DOWN, times

async def main():
    clock = FakeClock(auto=False)
    store = SQLiteStore(Path(sys.argv[1]))
    circuits = SQLiteCircuits(lambda: store.database, clock)
    layer = Breaker(Breakers(BreakerSettings(), clock, circuits, current_owner))
    await times(5, layer, clock, DOWN)
    print("open", flush=True)
    sys.stdin.readline()
    await clock.advance(60)
    below = Script(clock, HANG)
    asyncio.create_task(chain(layer, below)(call_for(clock, deadline=None)))
    while not below.calls:
        await asyncio.sleep(0)
    print("probing", flush=True)
    sys.stdin.readline()

asyncio.run(main())
"""


def test_a_prober_that_is_killed_blocks_nobody(tmp_path) -> None:
    clock = FakeClock(auto=False)
    store = SQLiteStore(tmp_path / "ledger.sqlite3")
    breakers = Breakers(BreakerSettings(), clock, SQLiteCircuits(lambda: store.database, clock), current_owner)
    layer = Breaker(breakers)
    process = subprocess.Popen(
        [sys.executable, "-c", PROBER, str(store.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def asked(step: object = ("ok",)) -> BaseException | None:
        return run(lambda: times(1, layer, clock, step))[0]

    assert process.stdout.readline() == "open\n"
    assert asked().state == "open"
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "probing\n"
    run(lambda: clock.advance(60))
    assert asked().state == "half_open"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [asked(), asked()] == [None, None]
    assert breakers.of(endpoint()).state == "closed"
    store.close()


def test_clients_with_one_ledger_share_their_circuits(tmp_path) -> None:
    clock = FakeClock(auto=False)
    simulator = Simulator("fine", clock=clock)
    config = llmkit.Config.of(
        environ={},
        model="m",
        models={"m": {"provider": "acme", "model": "m-1", "price": {"input": 1, "output": 1}}},
        providers={"acme": {"base_url": "http://acme.test/v1"}},
        state={"url": f"sqlite:///{tmp_path}/ledger.sqlite3"},
        retry={"attempts": 1},
        cache={"enabled": False},
    )
    settings = {"config": config, "transport": simulator, "clock": clock}
    with llmkit.Client(**settings) as one, llmkit.Client(**settings) as two:
        simulator.fail(Fault.status(503), times=5)
        for _ in range(5):
            with pytest.raises(errors.ProviderOverloaded):
                one.complete("x")
        (row,) = two.breakers().to_dict("records")
        assert (row["endpoint"], row["base_url"], row["state"]) == ("acme:m-1", "http://acme.test/v1", "open")
        with pytest.raises(errors.CircuitOpen) as caught:
            two.complete("x")
        assert caught.value.spent == 0
        assert simulator.calls == 5
        two.circuits.reset()
        asyncio.run(clock.advance(1))
        assert one.complete("x").text == "fine"
        assert two.complete("x").text == "fine"
        for circuit in one.circuits:
            circuit.isolate()
        asyncio.run(clock.advance(1))
        with pytest.raises(errors.CircuitOpen, match="isolated by hand"):
            two.complete("x")


def test_a_plan_of_a_circuit_is_what_it_would_say_and_changes_nothing() -> None:
    async def main() -> None:
        clock = FakeClock()
        breakers = Breakers(BreakerSettings(failures=1, probes=1), clock)
        assert await breakers.plan(endpoint()) is None
        assert list(breakers) == []
        circuit = breakers.of(endpoint())
        circuit.report(circuit.admit(), DOWN)
        refusal = await breakers.plan(endpoint())
        assert isinstance(refusal, errors.CircuitOpen)
        assert (refusal.state, refusal.retry_after) == ("open", 60)
        await clock.advance(60)
        assert await breakers.plan(endpoint()) is None
        assert circuit.state == "open"
        circuit.admit()  # the probe is out
        assert (await breakers.plan(endpoint())).state == "half_open"
        circuit.isolate()
        assert (await breakers.plan(endpoint())).state == "isolated"

    run(main)
