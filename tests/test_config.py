"""Settings: where they come from, which wins, and one clear error for each mistake."""

from __future__ import annotations

import json
import traceback
from decimal import Decimal
from pathlib import Path
from textwrap import dedent

import pytest

import llmkit
from llmkit.config import AlertSettings, CacheSettings, Config, Limit
from llmkit.errors import ConfigError

KEY = "sk-proj-abcdEFGH1234567890abcd"

SURFACE = """\
model = "smart"                                    # default

[models.smart]                                     # an alias is a chain
chain = ["openai:gpt-5-mini", { model = "anthropic:claude-haiku-4-5", max_cost_usd = 0.02, max_latency_s = 8 }, "local"]

[models.local]
provider = "vllm"                                  # or openai, anthropic, ollama, any entry of [providers]
model = "Qwen/Qwen3-8B"
base_url = "http://127.0.0.1:8000/v1"
api_key_env = "LOCAL_KEY"                          # optional; the name of a variable, never a key
price = { input = 0.10, output = 0.30 }            # optional, USD per million tokens; overrides the price table
max_concurrency = 32                               # optional

[budget]
request = { usd = 0.05, tokens = 20000 }
session = { usd = 1.00 }
day = { usd = 5.00 }
month = { usd = 50.00, tokens = 10_000_000 }
at_limit = "error"                                 # or "downgrade", "warn"

[timeout]
connect = 5
first_token = 30
idle = 30                                          # between chunks
total = 120                                        # seconds, waits included; or preset = "chat" | "code"

[retry]
attempts = 4                                       # in all
initial = 0.5
maximum = 60

[breaker]
failures = 5
open_s = 60
probes = 1
successes = 2

[cache]
enabled = true
ttl = "7d"
max_bytes = "1GB"

[degraded]
text = "The assistant is busy; please try again in a minute."

[rate_limit]
[guardrails]
[slo.assistant]
p95_s = 2.5
error_rate = 0.01
mean_cost_usd = 0.01
[state]
url = "sqlite"                                     # a file in the user's data folder; or "memory", "redis://…"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A home of its own, so that no file of whoever runs the tests is found above."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def load(folder: Path, text: str = "", environ=None, name: str = "llmkit.toml", **settings) -> Config:
    if text:
        (folder / name).write_text(dedent(text), encoding="utf-8")
    return Config.load(folder, environ or {}, **settings)


def refused(folder: Path, text: str = "", environ=None, name: str = "llmkit.toml", **settings) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, environ, name, **settings)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None  # no foreign error beside it
    return caught.value


# -- the whole example -------------------------------------------------------------------------------------------------


def test_the_documented_example_loads(folder) -> None:
    config = load(folder, SURFACE)
    first, second, third = config.route("smart")
    assert first.endpoint.name == "openai:gpt-5-mini"
    assert (second.endpoint.name, second.max_cost_usd, second.max_latency_s) == (
        "anthropic:claude-haiku-4-5",
        Decimal("0.02"),
        8.0,
    )
    local = third.endpoint
    assert (local.name, local.base_url, local.local) == ("vllm:Qwen/Qwen3-8B", "http://127.0.0.1:8000/v1", True)
    assert (local.api_key_env, local.key_required) == ("LOCAL_KEY", False)
    assert (local.price.input, local.price.output) == (Decimal("0.10"), Decimal("0.30"))
    assert (config.budget.request_usd, config.budget.request_tokens) == (Decimal("0.05"), 20000)
    assert config.budget.request_usd_set
    assert (config.timeouts.connect, config.timeouts.total, config.timeouts.first_token_set) == (5.0, 120.0, True)
    assert (config.retry.attempts, config.retry.initial, config.retry.maximum) == (4, 0.5, 60.0)
    assert (config.breaker.failures, config.breaker.successes, config.breaker.minimum_calls) == (5, 2, 5)
    assert config.degraded_text == "The assistant is busy; please try again in a minute."
    assert config.state_url == "sqlite"
    assert config.budget.limits == (
        Limit("session", Decimal("1.00")),
        Limit("day", Decimal("5.00")),
        Limit("month", Decimal("50.00"), 10_000_000),
    )
    assert (config.cache.enabled, config.cache.ttl_s, config.cache.max_bytes) == (True, 7 * 86_400, 10**9)
    assert str(config.default_model()) == "smart (from llmkit.toml)"
    assert list(config.aliases()) == ["smart", "local"]
    assert config.file == folder / "llmkit.toml"


def test_what_has_no_effect_is_said(folder) -> None:
    notices = "\n".join(load(folder, SURFACE).notices)
    for name in ("[slo]", "local: max_concurrency"):
        assert name in notices
    for name in ("guardrails", "budget", "cache"):  # an empty table asks for nothing, and the others do what they say
        assert name not in notices
    assert load(folder, "budget.request.usd = 1\nbudget.at_limit = 'error'").notices == ()


def test_without_any_setting_the_defaults_hold(folder) -> None:
    config = load(folder)
    assert config.model is None
    assert config.file is None
    assert config.notices == ()
    assert (config.budget.request_usd, config.budget.request_usd_set) == (Decimal("0.50"), False)
    assert (config.timeouts.first_token, config.timeouts.total, config.timeouts.first_token_set) == (30.0, 120.0, False)
    assert (config.retry.attempts, config.breaker.failures, config.offline) == (4, 5, False)


def test_session_and_day_have_limits_that_nobody_set_and_one_line_lifts(folder) -> None:
    by_default = load(folder).budget
    assert by_default.limits == (
        Limit("session", Decimal(5), is_default=True),
        Limit("day", Decimal(20), is_default=True),
    )
    assert load(folder, environ={"LLMKIT_BUDGET_SESSION_USD": "off"}).budget.limits == by_default.limits[1:]
    assert load(folder, budget={"session": {"usd": 7}}).budget.limits[0] == Limit("session", Decimal(7))
    assert load(folder, "budget.day.usd = 'off'").budget.limits == by_default.limits[:1]
    assert load(folder, "budget.day.tokens = 9").budget.limits[1] == Limit("day", Decimal(20), 9, is_default=True)


def test_limits_of_users_tags_and_models(folder) -> None:
    text = """
        [budget]
        timezone = "Europe/Berlin"
        at_limit = "downgrade"
        session = { usd = "off" }
        day = { usd = "off" }
        [budget.user."*"]
        day = { usd = 1 }
        [budget.user."ana@example.org"]
        day = { usd = 2 }
        month = { usd = "off", tokens = 1000 }
        [budget.tag."app=docs"]
        total = { usd = 3 }
        [budget.model."openai:gpt-5"]
        hour = { usd = "off" }
    """
    budget = load(folder, text).budget
    assert (budget.timezone, budget.at_limit, budget.warn_at) == ("Europe/Berlin", "downgrade", 0.8)
    assert budget.limits == (
        Limit("day", Decimal(1), None, "user", "*"),
        Limit("day", Decimal(2), None, "user", "ana@example.org"),
        Limit("month", None, 1000, "user", "ana@example.org"),
        Limit("total", Decimal(3), None, "tag", "app=docs"),
    )


def test_a_limit_of_a_model_names_an_endpoint_since_an_alias_would_never_be_met(folder) -> None:
    aliases = """
        [models.fast]
        model = "openai:gpt-5-mini"
        [models.smart]
        chain = ["openai:gpt-5", "fast"]
    """
    error = refused(folder, f"{aliases}[budget.model.fast]\nday = {{ usd = 1 }}")
    assert "write openai:gpt-5-mini" in error.message
    assert error.line is not None
    error = refused(folder, f"{aliases}[budget.model.smart]\nday = {{ usd = 1 }}")
    assert "write openai:gpt-5 or openai:gpt-5-mini" in error.message
    assert "write openai:gpt-5-nano" in refused(folder, "[budget.model.gpt-5-nano]\nday = { usd = 1 }").message
    assert "did you mean openai:gpt-5?" in refused(folder, "[budget.model.'opnai:gpt-5']\nday = { usd = 1 }").message
    assert load(folder, "[budget.model.'*']\nday = { usd = 1 }").budget.limits[-1].name == "*"


def test_cache_alerts_and_state_are_read(folder) -> None:
    text = """
        [cache]
        enabled = false
        ttl = "off"
        memory_bytes = "1MB"
        namespace = "tag:app"
        persist = false
        [alerts]
        call_usd = "off"
        jump = 3
        [state]
        url = "redis://127.0.0.1:6379/2"
        on_failure = "continue"
    """
    config = load(folder, text)
    assert config.cache == CacheSettings(
        enabled=False, ttl_s=None, memory_bytes=10**6, namespace="tag:app", persist=False
    )
    assert config.alerts == AlertSettings(call_usd=None, jump=3.0)
    assert (config.state_url, config.state_on_failure) == ("redis://127.0.0.1:6379/2", "continue")
    assert "password" in refused(folder, "[state]\nurl = 'redis://:hunter2@h:6379'").message
    url = "redis://:hunter2@h:6379"
    (folder / "llmkit.toml").unlink()
    assert load(folder, environ={"LLMKIT_STATE_URL": url}).state_url == url


# -- which file --------------------------------------------------------------------------------------------------------


def test_the_nearest_file_upwards_is_read_and_no_other(folder) -> None:
    deep = folder / "a" / "b"
    deep.mkdir(parents=True)
    load(folder, "retry.attempts = 9")
    load(folder / "a", "timeout.total = 7")
    config = Config.load(deep, {})
    assert config.timeouts.total == 7
    assert config.retry.attempts == 4  # files are not mixed


def test_llmkit_toml_wins_over_pyproject_in_one_folder(folder) -> None:
    (folder / "pyproject.toml").write_text("[tool.llmkit]\nretry.attempts = 2\n")
    assert load(folder).retry.attempts == 2
    assert load(folder, "retry.attempts = 3").retry.attempts == 3


def test_a_pyproject_that_is_not_ours_is_passed_by(folder) -> None:
    inner = folder / "inner"
    inner.mkdir()
    load(folder, "retry.attempts = 3")
    (inner / "pyproject.toml").write_text("[project\nname = 'broken, and none of our business'")
    assert Config.load(inner, {}).retry.attempts == 3
    (inner / "pyproject.toml").write_text("[tool.other]\nname = 'llmkit'")
    assert Config.load(inner, {}).retry.attempts == 3


def test_the_search_ends_at_the_home_folder(folder, monkeypatch) -> None:
    home = folder / "home"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    load(folder, "retry.attempts = 9")
    assert Config.load(home / "work", {}).retry.attempts == 4
    load(home, "retry.attempts = 8")
    assert Config.load(home / "work", {}).retry.attempts == 8


def test_the_current_folder_is_where_it_starts(folder, monkeypatch) -> None:
    load(folder, "retry.attempts = 6")
    monkeypatch.chdir(folder)
    assert Config.load(environ={}).retry.attempts == 6
    assert Config.of({}).retry.attempts == 4  # from arguments alone


def test_lines_in_pyproject_are_those_of_the_file(folder) -> None:
    error = refused(folder, '[project]\nname = "x"\n\n[tool.llmkit.timeout]\ntotal = -1\n', name="pyproject.toml")
    assert (error.file, error.line) == (folder / "pyproject.toml", 5)


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES = [
    ("modle = 'x'", 1, "did you mean model?"),
    ("\n\n[timout]\ntotal = 1", 3, "did you mean timeout?"),
    ("[timeout]\nconnect = 5\ntotl = 1", 3, "did you mean total?"),
    ("[timeout]\nconnect = 5\n\n# a note\ntotal = -1", 5, "from 0.001 to 86400"),
    ("[timeout]\ntotal = 0", 2, '"off" for no limit'),
    ("[timeout]\ntotal = nan", 2, "not NaN"),
    ("[timeout]\ntotal = inf", 2, "from 0.001 to 86400"),
    ("[timeout]\ntotal = '60'", 2, "a number of seconds"),
    ("[timeout]\ntotal = true", 2, "not true"),
    ("[timeout]\npreset = 'chatty'", 2, '"chat" or "code"'),
    ("timeout = 30", 1, "must be a table of preset, connect"),
    ("timeout.total = -3", 1, "timeout.total must be"),
    ("timeout = { connect = 1, total = -3 }", 1, "timeout.total"),
    ("[retry]\nattempts = 21", 2, "from 1 to 20"),
    ("[retry]\nattempts = 2.5", 2, "a whole number"),
    ("[retry]\nattempts = 0x" + "f" * 5000, 2, "a very large number"),
    ("[retry]\nmaximum = 2\ninitial = 3", 3, "must not be above retry.maximum"),
    ("[budget]\nrequest = { usd = 0 }", 2, '"off" for no limit'),
    ("[budget]\nrequest = { usd = false }", 2, "an amount of USD"),
    ("[budget]\nrequest = { usd = 1, token = 5 }", 2, "did you mean tokens?"),
    ("[budget.request]\n'usd' = -1", 2, "budget.request.usd"),
    ("[budget]\nat_limit = 'stop'", 2, '"error" or "downgrade" or "warn"'),
    ("[breaker]\nrate = 1.5", 2, "from 0.001 to 1"),
    ("[cache]\nttl = '7 fortnights'", 2, '"7d"'),
    ("[cache]\nmax_bytes = 'big'", 2, '"1GB"'),
    ("[state]\nurl = 'redis://'", 2, '"redis://HOST:PORT/NUMBER"'),
    ("[state]\non_failure = 'ignore'", 2, '"refuse" or "continue"'),
    ("[budget]\ntimezone = 'Mars/Olympus'", 2, "the name of a time zone"),
    ("[budget]\ntimezone = '../../etc/passwd'", 2, "the name of a time zone"),
    ("[budget]\nwarn_at = 80", 2, "a share of the limit"),
    ("[budget.user.ana]\nfortnight = { usd = 1 }", 2, "there are session, hour, day, week, month, total"),
    ("[budget.tag.docs]\nday = { usd = 1 }", 1, "a tag is key=value"),
    ('[budget.user."a\\u0000b"]\nday = { usd = 1 }', 1, "printable characters"),
    ("[cache]\nttl = 'soon'", 2, '"7d"'),
    ("[cache]\nnamespace = 'tag'", 2, '"tag:NAME"'),
    ("[alerts]\njump = 1", 2, "times the usual hour"),
    ("[state]\nurl = 'postgres://x'", 2, '"memory"'),
    ("[slo.a]\np95 = 3", 2, "did you mean p95_s?"),
    ("[degraded]\ntext = ''", 2, "must be text"),
    ("model = 'smrt'\n[models.smart]\nchain = ['simulator']", 1, "did you mean smart?"),
    ("model = 'opnai:gpt-5'", 1, "did you mean openai:gpt-5?"),
    ("[models.a]\nprovider = 'vlm'\nmodel = 'x'", 2, "did you mean vllm?"),
    ("[models.a]\nprovider = 'vllm'", 1, "needs model"),
    ("[models.a]\nchain = [\n  'simulator',\n  'opnai:x',\n]", 4, "did you mean openai:x?"),
    (
        "[models.a]\nchain = [\n  'simulator', # one\n  { model = 'simulator', max_cost = 1 },\n]",
        4,
        "did you mean max_cost_usd?",
    ),
    ("[models.a]\nchain = []", 2, "1 to 20"),
    ("[models.a]\nchain = ['simulator', { max_latency_s = 1 }]", 2, "needs model"),
    ("[models.a]\nchain = ['simulator']\nwindow = 5", 3, "is a chain, so window has no place"),
    ("[models.a]\nchain = ['b']\n[models.b]\nchain = ['a']", 4, "a → b → a"),
    ("[models.a]\nmodel = 'b'\n[models.b]\nmodel = 'simulator'", 2, 'chain = ["b"]'),
    ("[models.a]\nmodel = 'openai:'", 2, "names no model after the colon"),
    ("[models.a]\nmodel = 'simulator'\nprice = { input = 1 }", 3, "needs output"),
    ("[models.a]\nmodel = 'simulator'\nbase_url = 'http://x'", 3, "no base_url"),
    ("[models.a]\nmodel = 'vllm:x'\nbase_url = 'ftp://x'", 3, "http://"),
    ("[models.a]\nmodel = 'vllm:x'\nbase_url = 'http://h:99999'", 3, "a URL"),
    ("[models.a]\nmodel = 'vllm:x'\non = ['weekends']", 3, '"context_too_long" or "refused"'),
    ("[models.'a b']\nmodel = 'simulator'", 1, "a name there is made of"),
    ("[providers.box]\nlocal = true", 1, "needs base_url"),
    ("[providers.box]\nbase_url = 'http://x'\nwire = 'grpc'", 3, '"openai" or "anthropic"'),
    ("[providers.box]\nbase_url = 'http://x'\nquirks = ['none']", 3, '"no_stream_options"'),
    ("[providers.simulator]\nlocal = true", 1, "the simulator has no settings"),
    ("[models.a]\nmodel = 'openai:x'\nbase_url = 'https://gateway.example/v1'", 3, "not sent to another host unasked"),
    ("[providers.openai]\nbase_url = 'https://gateway.example/v1'", 2, "not sent to another host unasked"),
    ("[models.a]\nkey = 'none'", 2, "keys never stand in settings"),
    ("a = 1\nb = = 2", 2, "not TOML"),
    ("[models", 1, "not TOML"),
    ("x = 'never closed\n", 1, "not TOML"),
    ("[a]\n[a]", 2, "not TOML"),
]


@pytest.mark.parametrize(("text", "line", "says"), MISTAKES)
def test_a_mistake_is_one_error_with_its_line(folder, text, line, says) -> None:
    error = refused(folder, text)
    assert error.file == folder / "llmkit.toml"
    assert (error.line, says in error.message) == (line, True), error.message
    assert "\n" not in error.message


def test_an_error_says_what_else_there_is(folder) -> None:
    error = refused(folder, "[timeout]\nzzz = 1")
    assert error.next_step == "keys of [timeout]: preset, connect, first_token, idle, total"


def test_windows_line_ends_and_a_byte_order_mark_do_not_shift_the_line(folder) -> None:
    (folder / "llmkit.toml").write_bytes(b"\xef\xbb\xbf# one\r\n[timeout]\r\ntotal = -1\r\n")
    assert refused(folder).line == 3


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"model = 'x'\nb = '\xff\xfe'", 2, "not UTF-8"),
        (b"#" * 1_000_001, None, "longer than"),
        (b"a = " + b"[" * 100_000, None, "not TOML"),
        (b"a = 1e99999999999999999999999", None, "not TOML that can be used"),
        (b"a = " + b"9" * 5000, None, "not TOML that can be used"),
    ],
)
def test_a_file_that_is_no_text_is_an_error_too(folder, content, line, says) -> None:
    (folder / "llmkit.toml").write_bytes(content)
    error = refused(folder)
    assert says in error.message
    if line is not None:
        assert error.line == line


def test_a_file_that_may_not_be_read_is_an_error(folder, monkeypatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (folder / "llmkit.toml").write_text("model = 'x'")
    monkeypatch.setattr(Path, "open", forbidden)  # root, who may run the tests, may read everything
    assert "cannot be read: Permission denied" in refused(folder).message


def test_a_folder_that_may_not_be_looked_into_is_passed_by(folder, monkeypatch) -> None:
    def forbidden(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", forbidden)
    assert load(folder).file is None


def test_a_ring_of_many_links_ends(folder) -> None:
    levels = "\n".join(f"[models.m{i}]\nchain = ['m{i + 1}', 'm{i + 1}', 'm{i + 1}']" for i in range(12))
    error = refused(folder, f"{levels}\n[models.m12]\nmodel = 'simulator'")
    assert "more than 50 links" in error.message


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"\napi_key = '{KEY}'", 2),
        (f"[models.a]\nmodel = 'openai:x'\napi_key_env = '{KEY}'", 3),
        (f"[models.a]\nmodel = 'openai:x'\nkey = '{KEY}'", 3),
        ("[models.a]\nmodel = 'openai:x'\napi_key_env = 'abcdef0123456789abcdef0123456789'", 3),
        (f"[models.'{KEY}']\nmodel = 'openai:x'", 1),
        (f"[models.a]\nchain = ['simulator',\n  '{KEY}']", 3),
        ("[models.a]\nmodel = 'vllm:x'\nbase_url = 'http://me:hunter2@host/v1'", 3),
        (f"[guardrails]\ntoken = 'Bearer {KEY}'", 2),
        ("[models.a]\nmodel = 'openai:x'\napi_key_env = 'gsk_abcdefghij0123456789'", 3),
        (f"model = '{KEY}", 1),
    ],
)
def test_a_key_in_a_file_is_refused_and_not_repeated(folder, text, line) -> None:
    error = refused(folder, text)
    said = error.block() + repr(error) + str(error.args)
    assert error.line == line
    for secret in (KEY, KEY[3:], "hunter2", "abcdef0123456789", "abcdefghij0123456789"):
        assert secret not in said


def test_a_name_that_only_begins_like_a_key_is_a_model(folder) -> None:
    config = load(folder, "model = 'vllm:hf-internal-testing/tiny-random-llama'")
    assert config.route(config.model)[0].endpoint.model == "hf-internal-testing/tiny-random-llama"


def test_keys_show_nowhere(folder) -> None:
    environ = {"OPENAI_API_KEY": KEY, "LLMKIT_MODEL": "openai:gpt-5-mini"}
    config = load(folder, environ=environ)
    assert KEY not in f"{config!r} {config.route('gpt-5')} {config.default_model()} {config.notices}"
    for wrong in (KEY, f"openai {KEY}", f"vlm:{KEY}"):
        with pytest.raises(ConfigError) as caught:
            config.route(wrong)
        assert KEY not in caught.value.block()
    assert KEY not in refused(folder, environ={"LLMKIT_TIMEOUT_TOTAL": KEY}).block()
    assert KEY not in refused(folder, models={"a": {"api_key_env": KEY, "model": "openai:x"}}).block()


# -- variables and arguments -------------------------------------------------------------------------------------------


def test_variables_win_over_the_file_and_arguments_over_both(folder) -> None:
    environ = {
        "LLMKIT_TIMEOUT_TOTAL": "60",
        "LLMKIT_BUDGET_REQUEST_USD": "0.1",
        "LLMKIT_MODEL": "openai:b",
        "LLMKIT_RETRY_ATTEMPTS": "2",
    }
    text = "model = 'openai:a'\ntimeout.total = 5\ntimeout.idle = 4\nretry.attempts = 3"
    config = load(folder, text, environ, model="openai:c", timeout={"idle": 3}, retry_attempts=1)
    assert (config.timeouts.total, config.timeouts.idle) == (60.0, 3.0)
    assert config.budget.request_usd == Decimal("0.1")
    assert config.retry.attempts == 1
    assert str(config.default_model()) == "c at openai (as set here)"
    assert str(load(folder, text, environ).default_model()) == "b at openai (from LLMKIT_MODEL)"
    assert str(load(folder, text).default_model()) == "a at openai (from llmkit.toml)"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("LLMKIT_TIMEOUT_TOTL", "6", "did you mean LLMKIT_TIMEOUT_TOTAL?"),
        ("LLMKIT_BUDGET_REQEST_USD", "6", "did you mean LLMKIT_BUDGET_REQUEST_USD?"),
        ("LLMKIT_TIMEOUT_TOTAL", "soon", "LLMKIT_TIMEOUT_TOTAL: timeout.total must be a number of seconds"),
        ("LLMKIT_RETRY_ATTEMPTS", "2.5", "a whole number from 1 to 20"),
        ("LLMKIT_OFFLINE", "maybe", "true or false"),
        ("LLMKIT_MODEL", "smrt", "LLMKIT_MODEL: there is no alias or provider"),
        ("LLMKIT_RETRY_INITIAL", "99", "LLMKIT_RETRY_INITIAL: retry.initial"),
    ],
)
def test_a_wrong_variable_is_an_error_that_names_it(folder, name, value, says) -> None:
    error = refused(folder, environ={name: value})
    assert says in error.message
    assert error.file is None


def test_variables_that_are_empty_or_not_ours_change_nothing(folder) -> None:
    environ = {
        "LLMKIT_MODEL": " ",
        "LLMKIT_PROXY_KEY": KEY,
        "LLMKIT_DISPLAY": "final",
        "LLMKIT_QQQ": "1",
        "TIMEOUT_TOTAL": "1",
    }
    config = load(folder, environ=environ)
    assert config.model is None
    assert config.notices == ("LLMKIT_QQQ is set, but it is no setting of llmkit",)


def test_a_preset_is_a_whole_and_single_limits_stand_over_it(folder) -> None:
    chat = load(folder, timeout="chat").timeouts
    assert (chat.connect, chat.first_token, chat.idle, chat.total, chat.first_token_set) == (5, 10, 10, 30, False)
    code = load(folder, timeout_preset="code").timeouts
    assert (code.connect, code.first_token, code.idle, code.total) == (5, 30, 30, 60)
    own = load(folder, "timeout = { preset = 'chat', first_token = 3 }").timeouts
    assert (own.first_token, own.total, own.first_token_set) == (3, 30, True)
    text = "timeout = { total = 500, idle = 400 }"
    assert load(folder, text, {"LLMKIT_TIMEOUT_PRESET": "chat"}).timeouts.total == 30  # the later word holds
    assert load(folder, text, timeout=7).timeouts.total == 7


def test_off_lifts_a_limit_everywhere(folder) -> None:
    config = load(
        folder,
        "budget.request.usd = 'off'\ntimeout.total = 'off'",
        {"LLMKIT_TIMEOUT_IDLE": "off"},
        timeout_connect="off",
    )
    assert (config.budget.request_usd, config.budget.request_usd_set) == (None, True)
    assert (config.timeouts.total, config.timeouts.idle, config.timeouts.connect) == (None, None, None)


def test_money_is_exact_from_every_source(folder) -> None:
    assert load(folder, "budget.request.usd = 0.1").budget.request_usd == Decimal("0.1")
    assert load(folder, environ={"LLMKIT_BUDGET_REQUEST_USD": "0.1"}).budget.request_usd == Decimal("0.1")
    assert load(folder, budget_request_usd=0.1).budget.request_usd == Decimal("0.1")
    assert load(folder, budget={"request": {"usd": Decimal("0.1")}}).budget.request_usd == Decimal("0.1")


def test_with_gives_a_changed_copy(folder) -> None:
    config = load(folder, SURFACE)
    changed = config.with_(timeout_total=9, model=None, retry={"attempts": 2})
    assert (changed.timeouts.total, changed.retry.attempts, changed.model) == (9.0, 2, "smart")
    assert (config.timeouts.total, config.retry.attempts) == (120.0, 4)
    assert changed.with_(retry_attempts=3).timeouts.total == 9.0
    with pytest.raises(AttributeError):
        config.model = "other"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"timeout_totl": 1}, "did you mean timeout_total?"),
        ({"zzz": 1}, "there is no setting 'zzz'"),
        ({"timeout": {"total": -1}}, "timeout.total must be"),
        ({"timeout": "soon"}, "timeout.preset must be"),
        ({"retry": 3}, "retry must be a table"),
        ({"retry": 3, "retry_attempts": 1}, "retry must be a table"),
        ({"model": 5}, "model must be"),
        ({"budget_request_usd": float("nan")}, "an amount of USD"),
        ({"models": {"a": {"chain": "simulator"}}}, "must be a list of models"),
        ({"models": {3: {}}}, "a name there is made of"),
    ],
)
def test_wrong_arguments_are_config_errors(folder, settings, says) -> None:
    assert says in refused(folder, **settings).message


# -- routes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("gpt-5-mini", ["openai:gpt-5-mini"]),
        ("o3", ["openai:o3"]),
        ("claude-haiku-4-5", ["anthropic:claude-haiku-4-5"]),
        ("ollama:qwen3:8b", ["ollama:qwen3:8b"]),
        ("local", ["vllm:Qwen/Qwen3-8B"]),
        ("local, openai:gpt-5", ["vllm:Qwen/Qwen3-8B", "openai:gpt-5"]),
        ("simulator", ["simulator:simulator"]),
        ("simulator:slow", ["simulator:slow"]),
        ("openrouter:openai/gpt-5-mini", ["openrouter:openai/gpt-5-mini"]),
    ],
)
def test_a_name_leads_to_its_endpoints(folder, model, names) -> None:
    assert [link.endpoint.name for link in load(folder, SURFACE).route(model)] == names


@pytest.mark.parametrize(
    "model", ["", ",", "local,", "qwen3:8b", "gpt-oss-20b", "openai", "openai:", "nothing", "\x1b[31mx"]
)
def test_a_name_that_leads_nowhere_is_an_error(folder, model) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, SURFACE).route(model)
    assert "\x1b" not in caught.value.block()


def test_the_simulator_is_simulated_and_never_local(folder) -> None:
    endpoint = load(folder).route("simulator")[0].endpoint
    assert (endpoint.simulated, endpoint.local, endpoint.api_key_env) == (True, False, None)
    assert endpoint.base_url == "http://simulator.invalid/v1"


def test_limits_of_a_chain_reach_its_links(folder) -> None:
    text = """
        [models.outer]
        max_latency_s = 9
        chain = [
          { model = "inner", max_cost_usd = 0.05, on = ["context_too_long"] },
          { model = "simulator", disabled = true },
        ]
        [models.inner]
        chain = [{ model = "openai:a", max_cost_usd = 0.01 }, "openai:b"]
    """
    a, b, off = load(folder, text).route("outer")
    assert (a.max_cost_usd, b.max_cost_usd, off.max_cost_usd) == (Decimal("0.01"), Decimal("0.05"), None)
    assert {link.max_latency_s for link in (a, b, off)} == {9.0}
    assert (a.only_on, off.only_on) == (frozenset({"context_too_long"}), frozenset())
    assert (a.disabled, off.disabled) == (False, True)


@pytest.mark.parametrize("model", ["tiny\x1b[2J", "tiny\u202e", "t" * 501])
def test_a_model_has_no_name_that_a_terminal_would_obey_or_a_page_could_not_show(folder, model) -> None:
    with pytest.raises(ConfigError, match="is no model's name") as raised:
        load(folder).route(f"vllm:{model}")
    assert len(str(raised.value)) < 300
    text = f'[models.here]\nprovider = "vllm"\nmodel = {json.dumps(model)}\nbase_url = "http://127.0.0.1:9/v1"'
    with pytest.raises(ConfigError, match=r"line \d+: .*(model's name|at most 500)"):
        load(folder, text).route("here")


def test_what_is_known_of_a_model_reaches_its_endpoint(folder) -> None:
    text = """
        [models.big]
        model = "ollama:qwen3:8b"
        window = 32768
        max_output = 4096
        price = { input = 0, output = 0, cached_input = 0.5 }
    """
    endpoint = load(folder, text).route("big")[0].endpoint
    assert (endpoint.name, endpoint.window, endpoint.max_output) == ("ollama:qwen3:8b", 32768, 4096)
    assert endpoint.price.cached_input == Decimal("0.5")


def test_a_provider_of_ones_own(folder) -> None:
    text = """
        [providers.box]
        base_url = "http://10.0.0.5:9000/v1/"
        api_key_env = "BOX_KEY"
        quirks = ["no_stream_options"]
        [providers.claude_gateway]
        base_url = "https://gateway.example/v1"
        wire = "anthropic"
        [providers.vllm]
        base_url = "http://10.0.0.6:8000/v1"
    """
    config = load(folder, text)
    box, gateway, vllm = (config.route(f"{name}:m")[0].endpoint for name in ("box", "claude_gateway", "vllm"))
    assert (box.base_url, box.api_key_env, box.key_required) == ("http://10.0.0.5:9000/v1", "BOX_KEY", True)
    assert (box.quirks, box.local) == (frozenset({"no_stream_options"}), False)
    assert (gateway.wire, gateway.api_key_env) == ("anthropic", None)
    assert (vllm.base_url, vllm.local, vllm.api_key_env) == ("http://10.0.0.6:8000/v1", True, "VLLM_API_KEY")


def test_a_key_goes_only_to_the_host_it_belongs_to(folder) -> None:
    text = """
        [models.here]
        model = "openai:tiny"
        base_url = "http://127.0.0.1:9000/v1"
        [models.gateway]
        model = "openai:gpt-5"
        base_url = "https://gateway.example/v1"
        api_key_env = "GATEWAY_KEY"
        [models.open]
        model = "openai:gpt-5"
        base_url = "https://open.example/v1"
        api_key_env = "off"
        [models.region]
        model = "openai:gpt-5"
        base_url = "https://api.openai.com/v2"
    """
    config = load(folder, text)
    keys = {
        name: (links[0].endpoint.api_key_env, links[0].endpoint.key_required)
        for name, links in config.aliases().items()
    }
    assert keys == {
        "here": (None, False),
        "gateway": ("GATEWAY_KEY", True),
        "open": (None, False),
        "region": ("OPENAI_API_KEY", True),
    }


def test_a_base_url_variable_moves_a_provider_with_its_key(folder) -> None:
    environ = {"OPENAI_BASE_URL": "https://gateway.example/openai/", "ANTHROPIC_BASE_URL": "https://gateway.example"}
    config = load(folder, environ=environ)
    openai, anthropic = config.route("gpt-5,claude-haiku-4-5")
    assert (openai.endpoint.base_url, openai.endpoint.api_key_env) == (
        "https://gateway.example/openai",
        "OPENAI_API_KEY",
    )
    assert anthropic.endpoint.base_url == "https://gateway.example/v1"
    text = "[providers.openai]\nbase_url = 'https://other.example/v1'\napi_key_env = 'OTHER_KEY'"
    assert load(folder, text, environ).route("gpt-5")[0].endpoint.base_url == "https://other.example/v1"
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL must be"):
        load(folder, "model = 'simulator'", {"OPENAI_BASE_URL": "http://u:p@h"}).route("gpt-5")


# -- the default model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (None, "the simulator (offline: no call leaves this machine)"),
        ("openai:gpt-5", "the simulator (offline: no call leaves this machine)"),
        ("simulator:x", "the simulator (as set here)"),
        ("vllm:tiny", "tiny at vllm (as set here)"),
        ("vllm:tiny,openai:gpt-5", "the simulator (offline: no call leaves this machine)"),
    ],
)
def test_offline_the_default_stays_on_this_machine(folder, model, expected) -> None:
    config = load(folder, environ={"OPENAI_API_KEY": KEY, "LLMKIT_OFFLINE": "1"}, model=model)
    assert config.offline
    assert str(config.default_model()) == expected


def test_a_key_decides_where_no_setting_does(folder) -> None:
    config = load(folder, "retry.attempts = 2", {"ANTHROPIC_API_KEY": KEY})
    assert str(config.default_model()) == "claude-haiku-4-5 at anthropic (ANTHROPIC_API_KEY is set)"


def test_a_file_that_names_no_model_is_not_called_missing(folder, monkeypatch) -> None:
    from llmkit.providers import discovery

    monkeypatch.setattr(discovery, "_by_server", lambda _: None)
    assert str(load(folder).default_model()) == "the simulator (no config, key or local server found)"
    config = load(folder, "retry.attempts = 2")
    assert str(config.default_model()) == "the simulator (llmkit.toml names no model; no key or local server found)"


@pytest.mark.parametrize("settings", [{"retry_attempts": 1000}, {"bogus": 1}, {"model": "opnai:x"}])
@pytest.mark.parametrize("make", [Config.load, Config.of, llmkit.Client, llmkit.AsyncClient])
def test_a_wrong_setting_shows_no_variable_of_the_environment(monkeypatch, make, settings) -> None:
    secret = "zq9-secret-4711"
    monkeypatch.setenv("SOME_API_KEY", secret)
    monkeypatch.setenv("LLMKIT_LOCAL_KEY", secret)
    with pytest.raises(ConfigError) as caught:
        make(**settings)
    inside = [
        frame.f_locals
        for frame, _ in traceback.walk_tb(caught.value.__traceback__)
        if "tests" not in frame.f_code.co_filename
    ]
    assert secret not in repr(inside)


# -- tiers -------------------------------------------------------------------------------------------------------------


def test_a_tier_is_an_alias_or_a_model(folder) -> None:
    config = load(folder, '[tiers]\nsimple = "here"\nhard = "openai:gpt-5"\n[models.here]\nmodel = "ollama:tiny"\n')
    assert (config.tier("simple"), config.tier("hard")) == ("here", "openai:gpt-5")
    assert dict(config.with_(tiers={"simple": "simulator"}).tiers) == {"simple": "simulator", "hard": "openai:gpt-5"}
    assert load(folder, environ={"LLMKIT_TIERS_MEDIUM": "simulator"}).tier("medium") == "simulator"


def test_a_tier_that_leads_nowhere_is_named_with_its_line(folder) -> None:
    error = refused(folder, '[models.smart]\nmodel = "openai:gpt-5"\n[tiers]\nsimple = "simulator"\nhard = "smrat"\n')
    assert error.line == 5
    assert "there is no alias or provider for 'smrat'; did you mean smart?" in error.message
    assert "[tiers] has no 'hrad'; did you mean hard?" in refused(folder, '[tiers]\nhrad = "simulator"\n').message
    assert "tiers.hard must be" in refused(folder, "[tiers]\nhard = 3\n").message


def test_a_tier_that_is_not_set_shows_the_lines_that_set_it(folder) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, '[tiers]\nmedium = "simulator"\n').tier("simple")
    assert caught.value.message == "the tier simple is not set; [tiers] sets medium"
    assert "llmkit.toml" in caught.value.next_step
    assert caught.value.next_step.endswith('\n  [tiers]\n  simple = "provider:model"')
    (folder / "llmkit.toml").unlink()
    with pytest.raises(ConfigError) as caught:
        load(folder, "[tool.llmkit]\nmodel = 'simulator'\n", name="pyproject.toml").tier("hard")
    assert "\n  [tool.llmkit.tiers]\n  hard = " in caught.value.next_step
