"""The commands in a terminal: live bars and tables, and nothing that steers it."""

from __future__ import annotations

from pathlib import Path

import pytest
from api_server import ADAPTERS, Api
from commands import Medley
from working import Working

from medley.client import Client


@pytest.fixture
def run(api: Api, tenant: str) -> Medley:
    return Medley(api.url, api.key(tenant))


def test_a_sweep_shows_a_live_bar_and_its_report_as_a_table(
    api: Api, client: Client, run: Medley, tmp_path: Path
) -> None:
    name = next(ADAPTERS.iterdir()).name
    client.adapters.add(name, ADAPTERS / name)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1=", "expected": "2"}\n' * 20)
    with Working(api, text="2"):
        status, shown = run.in_terminal("sweep", "bar", prompts, "--adapters", "*")
    assert status == 0, shown
    assert "━" in shown
    assert "20/20" in shown
    assert "/s" in shown
    assert "\x1b[?25l" in shown, "the bar is live: the cursor is hidden while it moves"
    assert "\x1b[?25h" in shown
    assert name in shown
    assert "100.0%" in shown
    assert "\t" not in shown


def test_what_a_model_wrote_does_not_steer_the_terminal(api: Api, client: Client, run: Medley) -> None:
    batch = client.submit_many([{"prompt": "p", "custom_id": "[bold]"}], name="[red]")
    api.finish(batch.id, text="\x1b]0;title\x07\x9b31m")
    for command in ("results", "status"):
        status, shown = run.in_terminal(command, batch.id)
        assert status == 0, shown
        assert not {"\x07", "\x9b", "\x1b]"} & set(shown)
    assert "[red]" in run.in_terminal("status")[1]
    with Working(api, text="a\nb\x1b[2J"):
        assert run.in_terminal("submit", "p") == (0, "a\r\nb\\x1b[2J\r\n")


def test_an_error_is_one_plain_line_in_a_terminal_too(run: Medley) -> None:
    status, shown = run.in_terminal("status", "job_nobody")
    assert (status, shown) == (1, "error: there is no job 'job_nobody' (404 not_found)\r\n")
