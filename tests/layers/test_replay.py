"""llmkit.layers.replay: what a call was told is written down as it ends, and told again without anything below."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal

import pytest

from llmkit import errors
from llmkit.call import Attempt, Message, Skipped
from llmkit.events import AlertRaised, AttemptEnded, BudgetWarning
from llmkit.layers.replay import Recordist, Replay
from llmkit.recording.file import read
from llmkit.recording.recorder import recorder_at
from llmkit.recording.scrubbing import Scrub
from llmkit.reply import Usage
from llmkit.testing import FakeClock
from tests.layers.script import HANG, Script, call_for, chain, outcomes, run

NO_KEYS = Scrub(tuple)


def recording(path, clock, **more):
    return Recordist(recorder_at(path, Scrub(tuple)), clock, **more)


def replaying(path, clock, **more):
    return Replay(path, read(path), NO_KEYS, clock, **more)


async def nothing_below(call):
    raise AssertionError(f"a replayed call was sent: {call.messages}")


def told(reply, error):
    """All that a reader can see of how a call ended."""
    of_error = None if error is None else (type(error), error.block(), {**vars(error), "reply": None})
    if reply is None:
        return None, of_error
    names = ("text", "reasoning", "model", "provider", "source", "usage", "cost_usd", "saved_usd", "finish_reason")
    names += ("request_id", "latency_s", "time_to_first_token_s", "attempts", "skipped", "cut")
    chunks = [(chunk.text, chunk.reasoning) for chunk in reply.chunks]
    return [getattr(reply, name) for name in names], chunks, reply.outcome.status, of_error


async def there_and_back(tmp_path, *steps, prompts=None, prepare=None, **changes):
    """Ask ``prompts`` while they are recorded, then again from the file; what was told, both times."""
    path, seen = tmp_path / "calls.jsonl", []
    for number, prompts_now in enumerate((prompts or ["hi"], prompts or ["hi"])):
        clock = FakeClock()
        layer = recording(path, clock) if number == 0 else replaying(path, clock)
        below = Script(clock, *steps) if number == 0 else nothing_below
        told_now, ends = [], []
        for index, prompt in enumerate(prompts_now):
            call = call_for(clock, prompt=prompt, request_id=f"id {number} {index}", **changes)
            if prepare and number == 0:
                prepare(call)
            reply, error, statuses = await outcomes(chain(layer, below), call)
            told_now.append(told(reply, error))
            ends += statuses
        layer.finish()
        if number == 0:
            assert below.open == 0
        seen.append((told_now, ends))
    return seen


# -- the five scenarios ------------------------------------------------------------------------------------------------


def test_an_answer_is_told_again_chunk_by_chunk(tmp_path) -> None:
    async def main() -> None:
        first, again = await there_and_back(tmp_path, ["Hel", "lo ", "there"])
        assert again == first
        assert first[1] == ["complete"]
        assert first[0][0][1] == [("Hel", ""), ("lo ", ""), ("there", "")]

    run(main)


def test_what_failed_before_its_first_token_fails_again(tmp_path) -> None:
    error = errors.ProviderOverloaded("503: busy", provider="test", model="m", status=503, retry_after=3.5)

    async def main() -> None:
        first, again = await there_and_back(tmp_path, error)
        assert again == first
        assert again[0][0][1][1].startswith("ProviderOverloaded: 503: busy")

    run(main)


def test_what_broke_in_the_middle_breaks_there_again(tmp_path) -> None:
    async def main() -> None:
        first, again = await there_and_back(tmp_path, ["Hel", "lo", errors.StreamBroken("gone", provider="test")])
        assert again == first
        *_, status, error = again[0][0]
        assert (status, error[0]) == ("failed", errors.StreamBroken)
        assert again[0][0][1] == [("Hel", ""), ("lo", "")]

    run(main)


def test_what_its_reader_left_is_not_recorded_and_is_no_time_more(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"

    async def main() -> None:
        clock = FakeClock()
        layer, below = recording(path, clock), Script(clock, ["a", "b", "c"])
        reply = await layer(call_for(clock), below)
        await reply.aclose()
        assert reply.outcome.status == "aborted"
        whole = await layer(call_for(clock, request_id="whole"), below)
        await whole.read()
        layer.finish()
        assert [take.number for take in read(path).takes.values()] == [1]
        again = await replaying(path, clock)(call_for(clock), nothing_below)
        await again.read()
        assert (again.request_id, below.open) == ("whole", 0)

    run(main)


def test_a_replay_may_be_left_in_the_middle(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"

    async def main() -> None:
        clock = FakeClock()
        layer = recording(path, clock)
        await (await layer(call_for(clock), Script(clock, ["a", "b", "c"]))).read()
        layer.finish()
        reply = await replaying(path, clock)(call_for(clock), nothing_below)
        assert reply.text == "a"
        await reply.aclose()
        assert (reply.outcome.status, reply.text) == ("aborted", "a")

    run(main)


@pytest.mark.parametrize("step", [HANG, ["a", HANG]])
def test_what_is_cancelled_is_not_recorded(tmp_path, step) -> None:
    path = tmp_path / "calls.jsonl"

    async def main() -> None:
        clock = FakeClock()
        layer, below = recording(path, clock), Script(clock, step)

        async def ask() -> None:
            await (await layer(call_for(clock), below)).read()

        task = asyncio.create_task(ask())
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        layer.finish()
        assert (list(read(path).takes), below.open) == ([], 0)

    run(main)


# -- what is told again ------------------------------------------------------------------------------------------------


def attempt(number, **changes):
    known = {
        "provider": "test",
        "model": "m",
        "status": "complete",
        "started": 1.5e9 + 0.123456789,
        "latency_s": 0.1 + 0.2,
    }
    return Attempt(**{"number": number, **known, **changes})


def test_the_way_to_an_answer_is_told_again(tmp_path) -> None:
    def prepare(call) -> None:
        trail = call.trail
        trail.attempts += [
            attempt(1, status="failed", error="ProviderOverloaded", message="503", http_status=503, maybe_billed=True),
            attempt(2, time_to_first_token_s=0.1, usage=Usage(1, 2, estimated=True), cost_usd=Decimal("0.0000100")),
        ]
        trail.skipped += [Skipped("test:other", "CircuitOpen: open")]
        trail.warnings += ["beware"]
        trail.saved, trail.waited_s = Decimal("0.10"), 1.25

    async def main() -> None:
        first, again = await there_and_back(tmp_path, ["a"], prepare=prepare)
        assert again == first
        (take,) = read(tmp_path / "calls.jsonl").takes.values()
        call = take.checked().call(call_for(FakeClock()))
        assert (call.trail.warnings, call.trail.saved, call.trail.waited_s) == (["beware"], Decimal("0.10"), 1.25)
        assert str(call.trail.attempts[1].cost_usd) == "0.0000100"

    run(main)


def test_the_words_below_an_answer_are_heard_again(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"
    words = [BudgetWarning("r1", "day", "80 %"), AlertRaised("r1", "call", "dear", Decimal("1.5"), Decimal(1))]

    async def main() -> None:
        clock, heard, again = FakeClock(), [], []
        layer = recording(path, clock)

        def below(call):
            for word in words:
                call.trail.listener(word)
            call.trail.attempts.append(attempt(1))
            return Script(clock, ["a"])(call)

        await (await layer(call_for(clock, events=heard), below)).read()
        layer.finish()
        assert heard == words  # whoever listened still does
        await (await replaying(path, clock)(call_for(clock, events=again), nothing_below)).read()
        assert [each for each in again if isinstance(each, BudgetWarning | AlertRaised)] == words
        assert [each.attempt.number for each in again if isinstance(each, AttemptEnded)] == [1]

    run(main)


ALL_ERRORS = [
    errors.BudgetExceeded("no", scope="day", limit=Decimal("0.5"), needed=Decimal("1.25"), held=3, next_step="wait"),
    errors.CircuitOpen("open", endpoint="e", state="open", retry_after=1.5),
    errors.ContextTooLong("long", tokens=10, window=None),
    errors.NotCached("no"),
    errors.PriceUnknown("?", model="m"),
    errors.GuardrailBlocked("no", stage="input", guard="g", reason="r"),
    errors.RateLimited("slow", retry_after=2.0),
    errors.AuthenticationError("401", provider="p", model="m", status=401, provider_request_id="x"),
    errors.FirstTokenTimeout("late", limit=30.0, provider="p"),
    errors.EmptyReply("nothing", reasoning_tokens=7),
    errors.Refused("no", reason="filter"),
    errors.SchemaMismatch("no", problems=["a", "b"], repaired=True),
    errors.AllModelsFailed("both", [errors.ModelNotFound("404"), errors.TotalTimeout("t", limit=1.0)]),
    errors.ConfigError("no model", next_step="aliases: none"),
    errors.StoreError("locked"),
]


@pytest.mark.parametrize("error", ALL_ERRORS, ids=lambda error: type(error).__name__)
def test_each_kind_of_error_is_raised_again_with_all_its_fields(tmp_path, error) -> None:
    async def main() -> None:
        first, again = await there_and_back(tmp_path, error)
        assert again[0][0][1][:2] == first[0][0][1][:2]
        was, now = first[0][0][1][2], again[0][0][1][2]
        was.pop("errors", None), now.pop("errors", None)
        assert now == was
        assert {type(now[name]) for name in now} == {type(was[name]) for name in was}

    run(main)


def test_an_error_beside_a_whole_answer_brings_it_again(tmp_path) -> None:
    """As one that does not fit its schema does."""
    path = tmp_path / "calls.jsonl"

    async def main() -> None:
        clock = FakeClock()
        layer, below = recording(path, clock), Script(clock, ["no ", "JSON"])

        async def refusing(call):
            reply = await below(call)
            await reply.read()
            error = errors.SchemaMismatch("it does not fit", problems=["no JSON"])
            error.reply = reply
            raise error

        seen = []
        for ask, end in ((layer, refusing), (None, nothing_below)):
            if ask is None:
                layer.finish()
                ask = replaying(path, clock)  # noqa: PLW2901  the file is only there by now
            with pytest.raises(errors.SchemaMismatch) as raised:
                await ask(call_for(clock, request_id="r1"), end)
            seen.append((raised.value.block(), raised.value.reply.text, raised.value.reply.outcome.status))
        assert seen[0] == seen[1]
        assert seen[0][1:] == ("no JSON", "complete")

    run(main)


# -- the same question, several times ----------------------------------------------------------------------------------


def test_the_same_question_is_answered_in_the_order_asked_and_then_with_the_last(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"

    async def main() -> None:
        clock = FakeClock()
        layer, below = recording(path, clock), Script(clock, "one", "two", "three")
        for _ in range(3):
            await (await layer(call_for(clock), below)).read()
        layer.finish()
        for _ in range(2):  # a new replay begins with the first again
            replay = replaying(path, clock)
            texts = [await (await replay(call_for(clock), nothing_below)).read() for _ in range(5)]
            assert texts == ["one", "two", "three", "three", "three"]

    run(main)


def test_calls_at_once_are_told_apart_by_the_order_they_were_asked_in(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"

    async def main() -> None:
        clock = FakeClock()
        layer = recording(path, clock)
        gates = [asyncio.Event() for _ in range(20)]

        async def below(call):
            number = int(call.request_id)
            await gates[number].wait()
            return await Script(clock, [f"answer {number}", "."])(call)

        async def ask(number):
            prompt = "the same" if number % 2 else f"number {number}"
            return await (await layer(call_for(clock, prompt=prompt, request_id=str(number)), below)).read()

        tasks = [asyncio.create_task(ask(number)) for number in range(20)]
        for gate in reversed(gates):  # the last asked is the first answered
            gate.set()
            await asyncio.sleep(0)
        texts = await asyncio.gather(*tasks)
        layer.finish()
        asked = [take.asked["messages"][0]["content"] for take in read(path).takes.values()]
        assert asked == ["the same" if number % 2 else f"number {number}" for number in range(20)]
        replay = replaying(path, clock)

        async def again(number):
            prompt = "the same" if number % 2 else f"number {number}"
            return await (await replay(call_for(clock, prompt=prompt), nothing_below)).read()

        assert await asyncio.gather(*map(again, range(20))) == texts

    run(main)


def test_new_answers_what_is_there_and_records_the_rest(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"

    async def main() -> None:
        clock = FakeClock()
        layer = recording(path, clock)
        await (await layer(call_for(clock, prompt="old"), Script(clock, "old answer"))).read()
        layer.finish()
        before = path.read_text("utf-8")
        layer, below = recording(path, clock, new=True), Script(clock, "new answer")
        assert await (await layer(call_for(clock, prompt="old"), below)).read() == "old answer"
        assert await (await layer(call_for(clock, prompt="new"), below)).read() == "new answer"
        layer.finish()
        after = path.read_text("utf-8")
        assert (len(below.calls), after.startswith(before), len(after.splitlines())) == (1, True, 3)

    run(main)


# -- a question that is not there --------------------------------------------------------------------------------------


def mismatch(tmp_path, recorded, asked):
    path = tmp_path / "calls.jsonl"

    async def main():
        clock = FakeClock()
        layer = recording(path, clock)
        for each in recorded:
            await (await layer(call_for(clock, **each), Script(clock, "a"))).read()
        layer.finish()
        with pytest.raises(errors.ReplayMismatch) as raised:
            await replaying(path, clock)(call_for(clock, **asked), nothing_below)
        return raised.value

    return run(main)


def test_a_changed_prompt_shows_the_first_difference_and_the_nearest(tmp_path) -> None:
    text = "Summarise this table.\nKeep it to one line, please, and say what stands out."
    recorded = [{"prompt": "Something else entirely, about cats"}, {"prompt": text}]
    error = mismatch(tmp_path, recorded, {"prompt": text.replace("one line", "two lines")})
    lines = error.block().splitlines()
    assert lines[0] == "ReplayMismatch: this question is not in calls.jsonl"
    assert lines[1].startswith("nearest is call 2 of 2, 97% alike; ")
    assert lines[1].endswith("first difference: the user message, line 2, column 12")
    assert lines[2] == "- recorded: …marise this table.⏎Keep it to one line, please, and say what stands out."
    assert lines[3] == "+ asked:    …marise this table.⏎Keep it to two lines, please, and say what stands out."
    assert (
        lines[4]
        == "next: record it: %llm record calls.jsonl --new; or ask for real what was not recorded: %llm replay calls.jsonl --live"
    )


@pytest.mark.parametrize(
    ("asked", "where", "was", "now"),
    [
        ({"model": "other"}, "model", "m", "other"),
        ({"temperature": 0.7}, "temperature", "0.5", "0.7"),
        ({"seed": 3}, "seed", "(not set)", "3"),
        ({"role": "developer"}, "the role of message 1", "user", "developer"),
        ({"more": "and?"}, "message 2", "(not set)", "{'role': 'user', 'text': 'and?'}"),
    ],
)
def test_what_is_not_the_prompt_is_shown_as_well(tmp_path, asked, where, was, now) -> None:
    from llmkit.call import Params

    more = (Message("user", asked["more"]),) if "more" in asked else ()
    changed = {
        "model": asked.get("model", "m"),
        "messages": (Message(asked.get("role", "user"), "the question"), *more),
        "params": Params(temperature=asked.get("temperature", 0.5), seed=asked.get("seed")),
    }
    recorded = {"prompt": "the question", "model": "m", "params": Params(temperature=0.5)}
    lines = mismatch(tmp_path, [recorded], changed).difference.splitlines()
    assert lines[0].endswith(f"first difference: {where}")
    assert lines[1:] == [f"- recorded: {was}", f"+ asked:    {now}"]


@pytest.mark.parametrize(
    ("was", "now"), [("hello", "hallo"), ("Capital of France?", "capital of france"), ("猫は何", "犬は何")]
)
def test_a_short_prompt_has_a_nearest_too(tmp_path, was, now) -> None:
    others = [{"prompt": f"{number} quite other words"} for number in range(20)]
    lines = mismatch(tmp_path, [*others, {"prompt": was}], {"prompt": now}).difference.splitlines()
    assert lines[0].startswith("nearest is call 21 of 21, ")
    assert lines[1:] == [f"- recorded: {was}", f"+ asked:    {now}"]


def test_many_long_prompts_are_looked_through_by_their_ends(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("llmkit.recording.differences._MOST_READ", 4_000)
    long = " ".join(f"word{number}" for number in range(2_000))
    recorded = [{"prompt": f"{long[:9_000]} {number} {long}"} for number in range(20)]
    recorded.append({"prompt": f"the only one that begins so {long} and that ends so"})
    error = mismatch(tmp_path, recorded, {"prompt": f"the only one that begins so {long} and that ends thus"})
    assert error.difference.startswith(
        "nearest is call 21 of 21, 100% alike; first difference: the user message, line 1"
    )


def test_that_a_recording_was_cut_off_is_said_when_a_question_is_missing(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"

    async def main() -> None:
        clock = FakeClock()
        layer = recording(path, clock)
        for prompt in ("first", "second"):
            await (await layer(call_for(clock, prompt=prompt), Script(clock, "a"))).read()
        layer.finish()
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(errors.ReplayMismatch, match=r"not in calls\.jsonl, whose last line is cut off"):
            await replaying(path, clock)(call_for(clock, prompt="second"), nothing_below)

    run(main)


def test_nothing_alike_and_nothing_at_all(tmp_path) -> None:
    assert mismatch(tmp_path, [{"prompt": "cats"}], {"prompt": "dogs"}).message == (
        "this question is not in calls.jsonl, nor is one that is like it"
    )
    (tmp_path / "empty").mkdir()
    assert mismatch(tmp_path / "empty", [], {"prompt": "dogs"}).message == "nothing is recorded in calls.jsonl"


def test_live_asks_for_real_and_records_nothing(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"

    async def main() -> None:
        clock = FakeClock()
        layer = recording(path, clock)
        await (await layer(call_for(clock, prompt="old"), Script(clock, "old"))).read()
        layer.finish()
        before, replay = path.read_bytes(), replaying(path, clock, live=True)
        assert await (await replay(call_for(clock, prompt="new"), Script(clock, "new"))).read() == "new"
        assert await (await replay(call_for(clock, prompt="old"), nothing_below)).read() == "old"
        assert path.read_bytes() == before

    run(main)


# -- when it cannot be written -----------------------------------------------------------------------------------------


def test_a_call_that_cannot_be_written_is_answered_and_says_so(tmp_path, monkeypatch) -> None:
    path = tmp_path / "calls.jsonl"

    async def main() -> None:
        clock = FakeClock()
        layer = recording(path, clock)
        monkeypatch.setattr(layer.recorder, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        reply = await layer(call_for(clock), Script(clock, "a"))
        assert await reply.read() == "a"
        assert reply.call.trail.warnings == ["this call could not be recorded to calls.jsonl: No space left"]
        layer.finish()

    run(main)


def test_calls_in_flight_are_recorded_although_recording_has_ended(tmp_path) -> None:
    path = tmp_path / "calls.jsonl"

    async def main() -> None:
        clock = FakeClock()
        layer = recording(path, clock)
        reply = await layer(call_for(clock), Script(clock, ["a", "b"]))
        layer.finish()
        assert await reply.read() == "ab"
        assert len(read(path).takes) == 1
        layer = recording(path, clock)  # nobody holds it any longer
        layer.finish()

    run(main)


def test_a_line_can_be_read_by_people_and_by_any_json_reader(tmp_path) -> None:
    async def main() -> None:
        await there_and_back(tmp_path, ["Grüße \u2028"], prompts=["Sag „hallo“"])

    run(main)
    first, call = (tmp_path / "calls.jsonl").read_text("utf-8").split("\n")[:2]
    assert json.loads(first) == {"format": "llmkit-recording", "version": 1}
    assert json.loads(call)["asked"] == {"model": "m", "messages": [{"role": "user", "content": "Sag „hallo“"}]}
    assert "„hallo“" in call
    assert "\u2028" not in call
    assert json.loads(call)["answer"]["text"] == "Grüße \u2028"


def test_half_a_character_is_a_question_mark(tmp_path) -> None:
    async def main() -> None:
        _, again = await there_and_back(tmp_path, ["\ud83d", "\ude00"])
        assert again[0][0][1] == [("?", ""), ("?", "")]

    run(main)
