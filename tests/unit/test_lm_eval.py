"""Tasks of lm-eval, answered by the engine: scores are those of a plain computation, and what is wrong is one line."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_lm

from tersor import LLM
from tersor.cli.main import run
from tersor.errors import InputError, TersorError, UnsupportedError
from tersor.evaluate import find_tasks

pytest.importorskip("lm_eval")

from tersor.integrations.lm_eval import model as asked
from tersor.integrations.lm_eval import tasks

DOCUMENTS = [
    {"question": "def square(x):\n    return", "choices": [" x * x", " banana"], "gold": 0, "text": "import os\n"},
    {"question": "import", "choices": [" zebra", " os"], "gold": 1, "text": "class Point:\n    pass\n"},
]
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
process_results: !function own.results
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks, one a file, of two documents."""
    place = tmp_path_factory.mktemp("tasks")
    documents = place / "documents.jsonl"
    documents.write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    for name, rest in (("choice", CHOICE), ("rolling", ROLLING), ("generate", GENERATE)):
        text = COMMON.format(name=f"local_{name}", documents=documents) + rest
        (place / f"{name}.yaml").write_text(text)
    (place / "included.yaml").write_text("test_split: test\n")
    (place / "own.py").write_text("def results(doc, answers):\n    return {'exact_match': float(len(answers[0]))}\n")
    return place


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny_lm.TINY, tokenizer=tiny_lm.tokenizer(), device="cpu", kv_bytes=1 << 24)


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Keep data sets below `cache`, and ask no hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def request(*arguments: Any) -> Any:
    """What lm-eval hands over, as far as a model reads it."""
    return SimpleNamespace(args=arguments)


def logprobs(tokens: list[int]) -> torch.Tensor:
    """Return the log probabilities [T - 1, V] of what follows each token but the last, by transformers' code."""
    with torch.no_grad():
        return tiny_lm.model()(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)


def test_log_likelihoods_are_those_of_transformers(llm: LLM) -> None:
    pairs = [("def square(x):\n    return", " x * x"), ("import", " os"), ("import", " os"), ("", "class Point")]
    lm = asked.EngineLM(llm)
    found = lm.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        head = lm.tok_encode(context) if context else [lm.prefix_token_id]
        tokens = lm.tok_encode(context + continuation) if context else head + lm.tok_encode(continuation)
        rows = logprobs(tokens)[len(head) - 1 :]
        expected = rows.gather(1, torch.tensor(tokens[len(head) :])[:, None]).sum()
        assert score == pytest.approx(float(expected), abs=1e-3)
        assert greedy == (rows.argmax(-1).tolist() == tokens[len(head) :])
    assert found[1] == found[2] and found[0][0] < 0


def test_the_greedy_continuation_is_known_as_such(llm: LLM) -> None:
    tokenizer = tiny_lm.tokenizer()
    head = tokenizer("def f(")["input_ids"]
    best = int(logprobs([*head, 0])[-1].argmax())
    (greedy, other) = asked.EngineLM(llm)._loglikelihood_tokens(
        [(("", ""), head, [best]), (("", ""), head, [best + 1])]
    )
    assert greedy[1] is True and other[1] is False and greedy[0] > other[0]


def test_a_text_longer_than_the_context_is_scored_whole_in_windows(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    text = "def square(x):\n    return x * x\n"
    monkeypatch.setattr(asked.EngineLM, "max_length", 5)
    lm = asked.EngineLM(llm)
    tokens = [lm.prefix_token_id, *lm.tok_encode(text)]
    assert len(tokens) > 11
    expected, done = 0.0, 1
    while done < len(tokens):  # five at a time, the last ones with a whole context
        end = min(done + 5, len(tokens))
        window = tokens[end - 6 : end]
        rows = logprobs(window)
        expected += float(rows.gather(1, torch.tensor(window[1:])[:, None])[done - end :].sum())
        done = end
    found = lm.loglikelihood_rolling([request(text), request("")], disable_tqdm=True)
    assert found == [pytest.approx(expected, abs=1e-3), 0.0]


def test_generation_ends_where_the_task_says(llm: LLM) -> None:
    lm = asked.EngineLM(llm)
    context = "def read_file(path):\n    with"
    whole, cut = lm.generate_until(
        [request(context, {"until": [], "max_gen_toks": 12}), request(context, {"until": "(", "max_new_tokens": 12})]
    )
    assert "(" in whole and cut == whole.partition("(")[0]


def test_a_context_that_is_too_long_loses_its_beginning(llm: LLM) -> None:
    heard: list[list[int]] = []

    def generate(prompts: list[list[int]], *rest: Any, **options: Any) -> Any:
        heard.extend(prompts)
        return llm.generate(prompts, *rest, **options)

    short = SimpleNamespace(info=replace(llm.info, context=20), generate=generate)
    lm = asked.EngineLM(short)
    context = "def read_file(path):\n    with open(path) as file:\n        return file.read()\n"
    (drawn,) = lm.generate_until([request(context, {"max_gen_toks": 3})])
    assert drawn and heard == [lm.tok_encode(context)[-17:]] and len(lm.tok_encode(context)) > 17


def test_options_of_a_task_are_those_of_the_engine() -> None:
    greedy = asked.sampling({"until": ["\n", ""], "do_sample": False, "temperature": 0.7})
    assert (greedy.temperature, greedy.max_tokens, greedy.stop) == (0.0, asked.MOST_DRAWN, ("\n",))
    drawn = asked.sampling({"do_sample": True, "top_p": 0.9, "max_tokens": 7})
    assert (drawn.temperature, drawn.top_p, drawn.max_tokens, drawn.repetition_penalty) == (1.0, 0.9, 7, 1.0)
    with pytest.raises(InputError, match=r"'num_beams'.*: the engine has do_sample, "):
        asked.sampling({"num_beams": 4})


def test_what_cannot_be_answered_is_one_line(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    lm = asked.EngineLM(llm)
    with pytest.raises(InputError, match="a task draws 100000 tokens"):
        lm.generate_until([request("x", {"max_gen_toks": 100_000})])
    monkeypatch.setattr(asked.EngineLM, "max_length", 3)
    with pytest.raises(InputError, match="log-likelihood of 4 tokens, and the model reads 3"):
        lm._loglikelihood_tokens([(("", ""), [1], [1, 2, 3, 4])])


def test_files_and_folders_of_tasks_are_found_without_those_of_lm_eval(folder: Path) -> None:
    found = find_tasks(f"{folder / 'rolling.yaml'}, {folder}")
    assert found.names == ("local_rolling", "local_choice", "local_generate")
    assert "hellaswag" not in found.manager.all_tasks


def test_the_logger_of_lm_eval_is_left_as_it_was(folder: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, seen = logging.getLogger("lm_eval"), []
    before = logger.level

    def asked_for(*arguments: Any, **options: Any) -> Any:
        seen.append(logger.level)
        raise TersorError("no tasks here")

    logger.setLevel(logging.DEBUG)
    try:
        found = find_tasks(str(folder))
        monkeypatch.setattr(tasks.evaluator, "simple_evaluate", asked_for)
        with pytest.raises(TersorError, match="no tasks here"):
            tasks.run(found, llm, "tiny")
        assert seen == [logging.ERROR] and logger.level == logging.DEBUG
    finally:
        logger.setLevel(before)


def test_tasks_that_are_not_there_are_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.yaml").write_text("task: [")
    (tmp_path / "empty").mkdir()
    manager = SimpleNamespace(all_tasks=["hellaswag"], match_tasks=lambda names: [])
    monkeypatch.setattr(tasks, "TaskManager", lambda **options: manager)
    for text, words in (
        (" , ", "names no task"),
        ("hellaswig", "'hellaswig', did you mean 'hellaswag'?: lm-eval has no such task"),
        ("no/such.yaml", "no/such.yaml: no such file or folder"),
        (str(folder / "included.yaml"), "the file names no task"),
        (str(tmp_path / "empty"), "the folder holds no YAML file"),
        (str(tmp_path / "bad.yaml"), "no YAML"),
    ):
        with pytest.raises(InputError) as caught:
            find_tasks(text)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_without_lm_eval_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'tersor\[tasks\]'"):
        find_tasks("hellaswag")


def test_models_answer_tasks_from_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    offline(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "out.json"
    words = ["eval", str(tiny_lm.TINY), "--tasks", str(folder), "--device", "cpu", "-o", str(output)]
    assert run(words) == 0
    table, said = capfd.readouterr()
    assert "fatal" not in said, "git has nothing to say of a directory without a commit"
    result = json.loads(output.read_text())
    assert (result["kind"], result["version"], result["text"], result["limit"]) == ("tersor eval", 1, None, None)
    found = {(one["task"], one["metric"]): one for one in result["tasks"]}
    assert set(found) == {
        ("local_choice", "acc"),
        ("local_generate", "exact_match"),
        ("local_rolling", "bits_per_byte"),
    }
    assert {one["label"] for one in result["tasks"]} == {"tiny-lm"} and {
        one["documents"] for one in found.values()
    } == {2}
    lm = asked.EngineLM(LLM(tiny_lm.TINY, device="cpu", kv_bytes=1 << 22))
    nats = -sum(lm.loglikelihood_rolling([request(one["text"]) for one in DOCUMENTS], disable_tqdm=True))
    size = sum(len(one["text"].encode()) for one in DOCUMENTS)
    value = found["local_rolling", "bits_per_byte"]["value"]
    assert value == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert f"{value:.3f}" in table and "local_choice" in table
    assert 0 <= found["local_choice", "acc"]["value"] <= 1 and found["local_choice", "acc"]["error"] is not None
    assert found["local_generate", "exact_match"]["value"] > 0, "what the task's own code makes of the texts"


def test_a_task_whose_data_are_not_there_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llm: LLM
) -> None:
    offline(monkeypatch, tmp_path)
    (tmp_path / "gone.yaml").write_text(COMMON.format(name="gone", documents=tmp_path / "no.jsonl") + CHOICE)
    with pytest.raises(TersorError, match=r"^tiny: lm-eval cannot run gone: ") as caught:
        tasks.run(find_tasks(str(tmp_path / "gone.yaml")), llm, "tiny")
    assert "\n" not in str(caught.value)
