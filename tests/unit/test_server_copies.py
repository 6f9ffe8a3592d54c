"""A server with several copies of a model: what it says of them, and what signals do to their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from helpers.fake_engine import FakeEngine
from helpers.served import serving, tokenizer

from tersor.engine.stats import ANSWERS, LOST, STARTS, CopyStats, EngineStats, total

COMPLETE = "/v1/completions"
PROGRAM = """
import sys
from helpers.counting import Letters, Load

if __name__ == "__main__":
    from tersor.engine.copies import Copies
    from tersor.server.options import ServerOptions
    from tersor.server.serving import bind, serve

    options = ServerOptions(port=0)
    load = Load({"seconds": 0.02}, letters=True)
    copies = Copies(load, 2, Letters, say=lambda line: print(line, file=sys.stderr))
    with bind(options) as place:
        place.listen()
        print(f"http://127.0.0.1:{place.getsockname()[1]}", flush=True)
        serve(copies, options, place)
    copies.end()
"""


def test_health_and_numbers_say_how_each_copy_stands() -> None:
    busy = EngineStats(running=2, pages_used=3, pages_free=5, prompt_tokens=70, cached_tokens=8, generated_tokens=9)
    with serving(FakeEngine(tokenizer())) as server:
        assert server.http.get("/health").json() == {"status": "ok"}
        assert (
            "tersor_copy_" not in server.http.get("/metrics").text and server.http.get("/stats").json()["copies"] == []
        )
        server.engine.of_copies = [CopyStats(ANSWERS, 2, 512, busy), CopyStats(ANSWERS, 0, 0, EngineStats())]
        assert server.http.get("/health").json() == {"status": "ok", "copies": [ANSWERS, ANSWERS]}
        for state in (STARTS, LOST):
            server.engine.of_copies[1] = CopyStats(state, 0, 0, EngineStats())
            found = server.http.get("/health")
            assert (found.status_code, found.json()) == (200, {"status": "degraded", "copies": [ANSWERS, state]})
        lines = server.http.get("/metrics").text.splitlines()
        assert {
            'tersor_copy_healthy{copy="0"} 1',
            'tersor_copy_healthy{copy="1"} 0',
            'tersor_copy_requests{copy="0"} 2',
            'tersor_copy_load_tokens{copy="0"} 512',
            'tersor_copy_pages_free{copy="0"} 5',
            'tersor_copy_prompt_tokens_total{copy="0"} 70',
            'tersor_copy_prefix_hit_tokens_total{copy="0"} 8',
            'tersor_copy_generated_tokens_total{copy="1"} 0',
        } <= set(lines)
        assert lines.count("# TYPE tersor_copy_generated_tokens_total counter") == 1
        assert server.http.get("/stats").json()["copies"][0]["engine"]["running"] == 2
        server.engine.fail("all are lost")
        found = server.http.get("/health")
        assert (found.status_code, found.json()["status"]) == (503, "failed")


def test_numbers_of_copies_add_up() -> None:
    one, two = EngineStats(running=1, pages_free=7, generated_tokens=3), EngineStats(running=2, preemptions=4)
    assert total([one, two]) == EngineStats(running=3, pages_free=7, generated_tokens=3, preemptions=4)
    assert total([]) == EngineStats()


@contextmanager
def program(folder: os.PathLike[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server of two copies in a session of its own; yield it and where it answers."""
    script = os.path.join(folder, "program.py")
    with open(script, "w", encoding="utf-8") as file:
        file.write(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def copies_of(pid: int) -> list[int]:
    """Processes of a server that run, by its session."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8") as file:
                state, _, _, session = file.read().rpartition(")")[2].split()[:4]
            with open(f"/proc/{name}/cmdline", encoding="utf-8") as file:
                copy = "spawn_main" in file.read()
        except OSError:
            continue
        if copy and int(session) == pid and state != "Z":
            found.append(int(name))
    return found


def test_a_signal_to_all_processes_lets_open_requests_end_and_leaves_nothing_behind(tmp_path: os.PathLike[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with program(tmp_path) as (process, url):
            body = {"prompt": "Hello", "max_tokens": 40, "stream": True}
            with (
                httpx.Client(timeout=20) as client,
                client.stream("POST", f"{url}{COMPLETE}", json=body) as response,
            ):
                lines = (line for line in response.iter_lines() if line)
                next(lines)
                assert len(copies_of(process.pid)) == 2
                os.killpg(process.pid, number)
                *_, last, done = lines
            assert '"finish_reason":"length"' in last and done == "data: [DONE]"
            assert process.wait(10) == 0 and not copies_of(process.pid)
            assert process.stderr is not None and process.stderr.read() == ""


def test_copies_end_with_a_server_that_is_killed_and_one_that_is_killed_is_said_in_a_line(
    tmp_path: os.PathLike[str],
) -> None:
    with program(tmp_path) as (process, url):
        body = {"prompt": "Hello", "max_tokens": 4000, "stream": True}
        with (
            httpx.Client(timeout=20) as client,
            client.stream("POST", f"{url}{COMPLETE}", json=body) as response,
        ):
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            for pid in copies_of(process.pid):
                os.kill(pid, signal.SIGKILL)
            *_, error, done = lines
            assert "of 2 ended by SIGKILL" in error and done == "data: [DONE]"
        assert process.stderr is not None
        said = sorted(process.stderr.readline() for _ in range(2))
        assert [line.partition(" ended by SIGKILL; it had ")[0] for line in said] == ["copy 0 of 2", "copy 1 of 2"]
        assert all(line.endswith("is started again\n") for line in said)
        process.kill()
        end = time.monotonic() + 20
        while copies_of(process.pid):
            assert time.monotonic() < end
            time.sleep(0.01)
