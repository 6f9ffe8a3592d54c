"""A batch job: every request answered once, in the form of the API, and files that cannot be refused."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from helpers.batches import MIXED, Echo, Letters, go, read, request, write

from tersor.engine.batch_file import Progress, run_batch
from tersor.errors import InputError


def test_every_request_is_answered_once_and_every_failure_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED)
    seen: list[Progress] = []
    report = go(tmp_path, on_progress=seen.append)
    answers, errors = read(tmp_path / "out.jsonl"), read(tmp_path / "out.errors.jsonl")
    assert Counter(a["custom_id"] for a in answers) == Counter(
        [*(f"q{i}" for i in range(40)), *(f"many{i}" for i in range(10))]
    )
    assert [(e.get("line"), e["error"]["code"]) for e in errors[:3]] == [
        (41, "invalid_json"),
        (42, "duplicate_custom_id"),
        (58, "invalid_request"),
    ]
    assert sorted((e["custom_id"], e["error"]["message"]) for e in errors[3:]) == [
        (f"fails{i}", "no pages") for i in range(5)
    ]
    assert (report.progress.total, report.progress.done, report.progress.failed) == (58, 50, 8)
    assert report.exit_status == 0
    assert report.message == f"50 of 58 answered in {tmp_path}/out.jsonl, 8 failed (see {tmp_path}/out.errors.jsonl)"
    assert [p.done + p.failed for p in seen] == list(range(3, 59))
    assert (seen[0].rate, seen[0].left) == (0.0, None)
    assert seen[-1].rate > 0
    assert seen[-1].left == 0
    bodies = [a["response"]["body"] for a in answers]
    assert seen[-1].drawn == sum(len(choice["text"]) for body in bodies for choice in body.get("choices", ()))


def test_an_answer_has_the_form_of_the_api(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request("a", ["xy", "z"], n=2, max_tokens=3)])
    go(tmp_path)
    (line,) = read(tmp_path / "out.jsonl")
    assert line.keys() == {"id", "custom_id", "response", "error"}
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("a", None, 200)
    body = line["response"]["body"]
    assert (body["model"], body["created"]) == ("letters", 1_700_000_000)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert all(len(choice["text"]) == 3 for choice in body["choices"])
    assert line["id"].startswith("batch_req_")
    assert line["response"]["request_id"].startswith("req_")


def test_chats_and_embeddings_of_one_file_are_answered_as_such(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 4}
    line = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": chat}
    vectors, url = {"input": ["a", "ab"]}, "/v1/embeddings"
    write(
        tmp_path / "in.jsonl",
        [
            line,
            {"custom_id": "e", "method": "POST", "url": url, "body": vectors},
            {
                "custom_id": "b",
                "method": "POST",
                "url": "/v1/embeddings",
                "body": vectors | {"encoding_format": "base64"},
            },
        ],
    )
    go(tmp_path)
    found = {a["custom_id"]: a["response"]["body"] for a in read(tmp_path / "out.jsonl")}
    assert found["c"]["choices"][0]["message"]["role"] == "assistant"
    assert len(found["c"]["choices"][0]["message"]["content"]) == 4
    assert [one["embedding"] for one in found["e"]["data"]] == [[97.0, 0.5], [195.0, 0.5]]
    assert found["b"]["data"][1]["embedding"] == "AABDQwAAAD8="
    assert found["e"]["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


@pytest.mark.parametrize(
    ("source", "output", "errors", "message"),
    [
        ("in.jsonl", "in.jsonl", None, "that is the input, too"),
        ("in.jsonl", "link.jsonl", None, "that is the input, too"),
        ("in.jsonl", "out.jsonl", "in.jsonl", "that is the input, too"),
        ("in.jsonl", "out.jsonl", "out.jsonl", "output and error file are both"),
        ("in.jsonl", "out.jsonl", "out.jsonl.manifest.json", "that is the manifest of the output, too"),
        ("in.jsonl", "no/out.jsonl", None, "there is no folder"),
        ("in.jsonl", "", None, "the path is empty"),
        ("in.jsonl", ".", None, "Is a directory"),
        ("none.jsonl", "out.jsonl", None, "cannot read .*none.jsonl: No such file"),
        ("folder", "out.jsonl", None, "cannot read .*folder: Is a directory"),
        ("empty.jsonl", "out.jsonl", None, "empty.jsonl is empty"),
        ("in.jsonl", "pipe", None, "is no plain file"),
    ],
)
def test_files_that_cannot_be_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, output: str, errors: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = write(Path("in.jsonl"), MIXED[:2]).read_bytes()
    os.link("in.jsonl", "link.jsonl")
    Path("folder").mkdir()
    Path("empty.jsonl").write_text("\n  \n")
    os.mkfifo("pipe")
    with pytest.raises(InputError, match=message) as info:
        run_batch(source, output, Echo(), Letters(), model="letters", identity={}, errors=errors)
    assert "\n" not in str(info.value)
    assert Path("in.jsonl").read_bytes() == content


def test_a_greedy_question_that_is_asked_twice_is_run_once(tmp_path: Path) -> None:
    asked = [
        request("a", "same", temperature=0),
        request("b", ["other", "same"], temperature=0),
        request("c", "same", temperature=0, max_tokens=2),
        request("d", "same", temperature=0, logit_bias={"5": 1}),
        request("e", "same"),
        request("f", "same"),
        request("g", "same", temperature=0, seed=4),
        request("h", [[0]], temperature=0),
        request("i", [[0]], temperature=0),
    ]
    write(tmp_path / "in.jsonl", asked)
    engine = Echo()
    assert go(tmp_path, engine).progress.done == 7
    assert engine.ran == 7  # same, other, 2 tokens, bias, e, f, and the one that fails
    found = {a["custom_id"]: a["response"]["body"] for a in read(tmp_path / "out.jsonl")}
    assert found["a"]["choices"][0]["text"] == found["b"]["choices"][1]["text"] == found["g"]["choices"][0]["text"]
    assert found["a"]["id"] != found["g"]["id"]
    assert sorted(e["custom_id"] for e in read(tmp_path / "out.errors.jsonl")) == ["h", "i"]
