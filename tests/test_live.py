"""The live page, served by a process of its own: who is answered, and what a browser shows while runs are written."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import unified_diff
from pathlib import Path
from typing import Any

import pytest

from groupwise.evidence.live.server import known_host
from tests.pages import chromium, illegible, inaccessible, needs_browser
from tests.served import free_port
from tests.written import WrittenRun

TOKEN = "a-token-of-the-tests"


@contextmanager
def watching(*arguments: str | Path) -> Iterator["subprocess.Popen[str]"]:
    """`groupwise watch` as a user starts it."""
    command = [sys.executable, "-m", "groupwise", "watch", *map(str, arguments), "--no-open"]
    environment = {**os.environ, "GROUPWISE_WATCH_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert f"/{TOKEN}/" in line, line
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def port(home: Path) -> Iterator[int]:
    """A server that watches a directory of runs, and a run that is not there yet."""
    (home / "runs").mkdir()
    port = free_port()
    with watching(home / "runs", home / "later", "--port", str(port)):
        yield port


def asked(port: int, path: str, *, method: str = "GET", body: str | None = None, **headers: str) -> http.client.HTTPResponse:
    """The head of an answer. `headers`: with _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host="host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("content-length", str(len(body.encode())))
    connection.endheaders((body or "").encode() or None)
    return connection.getresponse()


def test_only_who_has_the_token_is_answered(port: int) -> None:
    page = asked(port, f"/{TOKEN}/")
    assert page.status == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "script-src 'sha256-" in policy
    assert page.headers["access-control-allow-origin"] is None and page.headers["referrer-policy"] == "no-referrer"
    for path in (
        "/",
        "/x/",
        f"/{TOKEN}",
        f"/{TOKEN}x/",
        f"/{TOKEN[:-1]}/follow",
        "/follow",
        f"//{TOKEN}/",
        "/%00/",
        f"/{TOKEN}/../runs",
    ):
        refused = asked(port, path)
        assert refused.status == 404 and TOKEN not in refused.read().decode(), path
        assert "content-security-policy" in refused.headers


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("127.0.0.1:1", True), ("localhost:9000", True), ("[::1]:9000", True), ("LOCALHOST", True),
        ("evil.example", False), ("127.0.0.1.evil.example", False), ("192.168.1.7", False), ("", False), ("[", False),
    ],
)  # fmt: skip
def test_names_that_others_can_lead_here_are_not_answered(port: int, host: str, answered: bool) -> None:
    """Ports may differ: a tunnel may have another one at its end."""
    assert asked(port, f"/{TOKEN}/", host=host).status == (200 if answered else 421)


def test_other_pages_change_and_read_nothing(port: int, home: Path) -> None:
    def post(path: str, body: str, **headers: str) -> int:
        return asked(port, f"/{TOKEN}/{path}", method="POST", body=body, **headers).status

    here = f"http://127.0.0.1:{port}"
    assert post("runs/remove", "no-such-run") == 400
    assert post("runs/remove", "no-such-run", origin=here, sec_fetch_site="same-origin") == 400
    assert post("runs/remove", "no-such-run", origin="http://evil.example") == 403
    assert post("runs/remove", "no-such-run", origin="null") == 403
    assert post("runs/remove", "no-such-run", origin="http://[") == 403
    assert post("runs/remove", "no-such-run", sec_fetch_site="cross-site", sec_fetch_mode="navigate") == 403
    assert asked(port, f"/{TOKEN}/follow", sec_fetch_site="cross-site", sec_fetch_mode="no-cors").status == 403
    assert asked(port, f"/{TOKEN}/", sec_fetch_site="cross-site", sec_fetch_mode="navigate").status == 200  # a link


def test_nothing_but_runs_is_read(port: int, home: Path) -> None:
    (home / "secret").mkdir()
    (home / "secret" / "recipe.toml").write_text("password = 1")
    (home / "secret" / "step-000001.jsonl").write_text("{}")
    for path in (home / "secret", Path("/etc/passwd"), Path("\0"), Path("x" * 5000), Path("x" * 300), Path("~nobody-here/x")):
        answer = asked(port, f"/{TOKEN}/runs/add", method="POST", body=str(path))
        text = answer.read().decode()
        assert answer.status == 400 and "password" not in text and set(json.loads(text)) == {"error"}, path
    for query in ("", "run=x&step=1&source=texts", "run=../secret&step=1&source=..", "run=&step=-1&source=texts", "step=1e3"):
        assert asked(port, f"/{TOKEN}/step?{query}").status == 400, query
    large = asked(port, f"/{TOKEN}/runs/add", method="POST", body="x" * 100_000)
    assert large.status == 400


# --- in a browser

FAILS_ONCE = """() => {
  const parse = JSON.parse;
  JSON.parse = (line) => {
    if (!line.startsWith('{"version"')) return parse(line);
    JSON.parse = parse;
    throw new Error("made");
  };
}"""
"""The next change cannot be taken in."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def opened(browser: Any, port: int, **settings: Any) -> tuple[Any, list[str]]:
    """The live page, and a list that collects errors and requests to others."""
    page, wrong, own = browser.new_context(**settings).new_page(), list[str](), f"http://127.0.0.1:{port}/"
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((own, "data:")) else wrong.append(request.url))
    page.goto(f"http://127.0.0.1:{port}/{TOKEN}/")
    page.wait_for_selector("html[data-drawn]")
    return page, wrong


def eventually(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """What a condition gives once it holds. A busy machine may take long."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, condition
        time.sleep(0.02)
    return found


def rows(page: Any) -> list[str]:
    """The followed runs as the page lists them: name, state and steps."""
    cells = (
        "[...document.querySelector('.followed tbody').rows].map((row) => [...row.cells].slice(0, 3).map((at) => at.textContent))"
    )
    listed: list[list[str]] = page.evaluate(cells)
    return [" | ".join(cells) for cells in listed]


def shows(page: Any, *texts: str) -> Callable[[], bool]:
    """Whether one row of the list has all these texts."""
    return lambda: any(all(text in row for text in texts) for row in rows(page))


def said(page: Any) -> list[str]:
    """All that the page says, by line, but for how the connection is and when something was written."""
    parts: list[str] = page.evaluate("[...document.querySelectorAll('main > section:not(#live)')].map((part) => part.innerText)")
    return "\n".join(parts).splitlines()


@needs_browser
def test_a_run_is_followed_over_a_kill_and_a_resume(browser: Any, port: int, home: Path) -> None:
    """What a page shows that has followed is what one shows that is opened now."""
    page, wrong = opened(browser, port)
    assert eventually(lambda: any("later" in row and "not there yet" in row for row in rows(page)))
    written = WrittenRun(home / "later")
    written.evaluate()
    for _ in range(3):
        step = written.step()
        assert eventually(shows(page, "later", f"{step} of 20"))
    written.note("<b>seen</b> at \u202e step 3")
    written.tear()
    written = WrittenRun(home / "later", resume_at=1)
    assert eventually(shows(page, "1 of 20"))
    for _ in range(10):
        written.step()
        if written.last == 5:
            assert eventually(shows(page, "5 of 20"))
            written.note("seen again")
    written.evaluate()
    assert eventually(shows(page, "11 of 20"))
    fresh, wrong_there = opened(browser, port)

    def differences() -> str:
        return "\n".join(unified_diff(said(page), said(fresh), n=0, lineterm=""))

    eventually(lambda: not differences())
    text = "\n".join(said(page))
    assert "<b>seen</b>" in text and "seen again" in text and "\u202e" not in text
    assert not wrong and not wrong_there
    assert not inaccessible(page) and not illegible(page)
    fresh.context.close()
    (home / "later" / ".lock").write_text(f"pid {os.getpid()} on {socket.gethostname()}\n")  # nothing that a page is told of
    assert eventually(shows(page, "later", "training"))
    (home / "later" / ".lock").unlink()
    assert eventually(shows(page, "later", "stopped"))
    page.context.close()


@needs_browser
def test_runs_are_added_and_removed_by_keyboard(browser: Any, port: int, home: Path) -> None:
    page, wrong = opened(browser, port, viewport={"width": 390, "height": 800}, locale="zh-CN", color_scheme="dark")
    WrittenRun(home / "runs" / "one").step()
    WrittenRun(home / "elsewhere" / "two", seed=1).step()
    assert eventually(shows(page, "one"))  # by itself

    def add(path: object) -> str:
        page.fill("#add-path", str(path))
        page.press("#add-path", "Enter")
        eventually(lambda: not page.inner_text(".add + p").startswith("正在查找"))
        text: str = page.inner_text(".add + p")
        return text

    assert "not a run directory" in add("<img src=x onerror=alert(1)>")
    add(home / "elsewhere" / "two")
    assert eventually(shows(page, "two"))
    assert not illegible(page) and not inaccessible(page)
    page.focus(".followed tr:has-text('two') button")
    page.keyboard.press("Enter")
    assert eventually(lambda: not shows(page, "two")())
    assert page.evaluate("document.activeElement.id") == "add-path"
    assert [error for error in wrong if "400" not in error] == []  # Chromium notes each answer of that kind
    page.context.close()


@needs_browser
def test_completions_that_a_resume_undid_are_read_anew_and_those_of_a_run_that_goes_stay(browser: Any, tmp_path: Path) -> None:
    """And a part that cannot be drawn, or a change that cannot be taken in, stops nothing; no run leaves nothing of it."""
    port, written = free_port(), WrittenRun(tmp_path / "run")
    written.step()
    written.step()
    with watching(tmp_path / "run", "--port", str(port)):
        page, wrong = opened(browser, port)
        page.locator("#completions").scroll_into_view_if_needed()

        def reads(words: str) -> Callable[[], bool]:
            return lambda: words in page.inner_text("#completions")

        eventually(reads("2 in step 2"))
        written = WrittenRun(tmp_path / "run", resume_at=1)
        written.added = " once more"
        written.step()
        eventually(reads("2 in step 2 once more"))
        (tmp_path / "run").rename(tmp_path / "away")
        eventually(lambda: "cannot be read any more" in page.inner_text("#live"))
        assert reads("2 in step 2 once more")()
        (tmp_path / "away").rename(tmp_path / "run")
        assert not wrong
        page.evaluate(FAILS_ONCE)
        written.step()
        eventually(shows(page, "3 of 20"))
        assert any("made" in text for text in wrong)
        page.click(".followed button")
        eventually(lambda: "No run is followed" in page.inner_text("#live"))
        assert not page.is_visible("#completions") and "0 runs" not in page.inner_text("#header")
    page.context.close()


def test_connections_that_ask_for_nothing_do_not_shut_the_page_out(port: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(120)]
    try:
        assert asked(port, f"/{TOKEN}/").status == 200
    finally:
        for connection in idle:
            connection.close()
    assert asked(port, f"/{TOKEN}/follow?since=x-{'9' * 5000}").status == 200


@needs_browser
def test_a_server_that_ends_and_comes_back_is_followed_again(browser: Any, tmp_path: Path) -> None:
    port, written = free_port(), WrittenRun(tmp_path / "run")
    written.evaluate()
    arguments = (tmp_path / "run", "--port", str(port))
    with watching(*arguments) as server:
        page, _ = opened(browser, port)
        eventually(shows(page, "0 of 20"))
        written.step()  # the last thing is sent before the server ends
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 143
    assert eventually(shows(page, "1 of 20"))
    assert eventually(lambda: re.search("has ended|does not answer", page.inner_text("#live")))
    assert eventually(lambda: written.step() > 4)
    with watching(*arguments):
        assert eventually(shows(page, "5 of 20"), 30)
        assert "Live" in page.inner_text("#live .connection")
    page.context.close()


def test_train_watch_serves_the_run_and_ends_with_it(tmp_path: Path) -> None:
    """The page's server answers while the run goes on, has its last step, and is gone after it."""
    small = ("training.steps=1", "training.eval_problems=2", "rollouts.prompts_per_step=1", "rollouts.group_size=2")
    settings = [f"--set={value}" for value in (*small, "learner.minibatches=1")]
    command = [sys.executable, "-m", "groupwise", "train", "quick", *settings, "--watch", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "GROUPWISE_WATCH_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if found := re.search(rf"http://127.0.0.1:(\d+)/{TOKEN}/", line):
                break
        else:
            raise AssertionError("".join(lines))
        with asked(int(found[1]), f"/{TOKEN}/follow") as followed:
            said = followed.read().decode().splitlines()  # to its end
        assert json.loads(said[-1]) == {"ended": True}
        lines += process.stdout
    assert process.returncode == 0, "".join(lines)
    assert any('"step":1,' in line for line in said)
    with pytest.raises(ConnectionRefusedError):
        asked(int(found[1]), "/")


def test_everywhere_is_asked_by_addresses_and_the_machine_s_name() -> None:
    """What is printed for --host 0.0.0.0 is answered, and no name of others'."""
    here = socket.gethostname()
    assert all(known_host(host, "0.0.0.0") for host in ("192.168.1.7:8420", "[fe80::1]:8420", f"{here}:8420", "localhost"))
    assert not any(known_host(host, "0.0.0.0") for host in ("evil.example", f"{here}.evil.example", ""))
    assert known_host("box.local:8420", "box.local") and not known_host(here, "192.168.1.7")
