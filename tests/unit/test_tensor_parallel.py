"""Models in several processes over gloo: answers are those of one, and a process that dies ends all with a line."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import packed_models, tiny_lm
from helpers.asked import OPTIONS, answers, broken, lost, same

import tersor
from tersor.checkpoint.source import open_source
from tersor.engine import workers
from tersor.engine.config import EngineConfig
from tersor.engine.orders import END, Line, Order
from tersor.errors import InputError, LostError, ShapeError, TersorError
from tersor.ops.collective import Ranks
from tersor.planner.placement import Placement


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a packed embedding, which is its head, and groups that no three ranks share evenly."""
    options: dict[str, Any] = {"format": "int4", "group_size": 32, "overrides": ["embed_tokens=int8:g64"]}
    changes = {"tie_word_embeddings": True, "head_dim": 32, "intermediate_size": 160, "max_position_embeddings": 256}
    made = packed_models.case("llama", tmp_path_factory.mktemp("model"), options, **changes).packed
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_lm.TINY / name, made)
    return made


@pytest.fixture(scope="module")
def wanted(path: Path) -> list[Any]:
    """What one process answers."""
    return answers(tersor.LLM(path, **OPTIONS))


def test_two_processes_answer_as_one_until_one_of_them_dies(path: Path, wanted: list[Any]) -> None:
    model = tersor.LLM(path, tensor_parallel=2, **OPTIONS)
    try:
        for _ in range(2):
            same(answers(model), wanted, 1e-4)
        with pytest.raises(InputError, match=r"torch\.distributed is in use"):
            tersor.LLM(path, tensor_parallel=2, **OPTIONS)
        lost(lambda: answers(model))
    finally:
        model.close()
    assert not multiprocessing.active_children() and not torch.distributed.is_initialized()


def test_a_closed_model_answers_no_more(path: Path) -> None:
    model = tersor.LLM(path, **OPTIONS)
    for _ in range(2):
        model.close()
    with pytest.raises(TersorError, match=r"^the model is closed$"):
        answers(model)


def test_ranks_are_there_as_long_as_somebody_has_the_engine(path: Path) -> None:
    core = tersor.LLM(path, tensor_parallel=2, **OPTIONS).core
    core.add("one", [5, 6, 7], tersor.SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    outputs = []
    while core.unfinished:
        outputs += core.step(partial=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3]
    del core
    gc.collect()
    assert not multiprocessing.active_children()


def test_what_a_rank_cannot_load_is_said_by_the_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_work", broken)
    with pytest.raises(LostError, match=r"^rank 1 of 2 ended: the weights do not fit$"):
        tersor.LLM(path, tensor_parallel=2, **OPTIONS)
    assert not multiprocessing.active_children() and not torch.distributed.is_initialized()


class Nobody:
    """Stands for the processes of other ranks, of which there are none."""

    def __init__(self, *arguments: object) -> None:
        self.closing = self.ended = False
        self.store = self.lost = None

    def greet(self) -> None:
        """Nobody is waited for."""

    def watch(self, seat: object) -> None:
        """Nobody is watched."""

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("error", [LostError("rank 1 of 2 ended"), KeyboardInterrupt()])
def test_ranks_that_do_not_connect_leave_a_process_that_may_try_again(
    path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        raise error

    made: list[Nobody] = []
    monkeypatch.setattr(workers, "_Children", lambda *arguments: made.append(Nobody()) or made[-1])
    monkeypatch.setattr(workers, "_connect", fails)
    for _ in range(2):
        with pytest.raises(type(error)):
            tersor.LLM(path, tensor_parallel=2, **OPTIONS)
        assert made[-1].ended and not torch.distributed.is_initialized()


def test_an_end_that_is_interrupted_ends_all_ranks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seat: object) -> None:
        raise KeyboardInterrupt

    children, left = Nobody(), [0]
    seat = SimpleNamespace(leave=lambda: left.append(1))
    monkeypatch.setattr(workers, "_Children", lambda *arguments: children)
    monkeypatch.setattr(workers, "_connect", lambda *arguments: seat)
    monkeypatch.setattr(workers, "_say_end", interrupted)
    with open_source(path) as source:
        team = workers.gather(EngineConfig(tensor_parallel=2, device="cpu"), source)
    with pytest.raises(KeyboardInterrupt):
        team.close()
    assert children.closing and children.ended and left == [0, 1]


def test_a_model_that_cannot_be_cut_so_often_is_refused_before_a_process_starts(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_Children", None)
    with pytest.raises(ShapeError, match=r"o_proj, query heads of a kv head: 2 .* 3 ranks"):
        tersor.LLM(path, tensor_parallel=5, **OPTIONS)


@pytest.mark.parametrize("count", [0, -2])
def test_ranks_are_at_least_one(count: int) -> None:
    with pytest.raises(InputError, match=rf"^tensor_parallel is {count}: it must be at least 1$"):
        tersor.LLM("anything", tensor_parallel=count)


def test_a_rank_of_torchrun_whose_model_was_not_closed_is_told_so_and_does_not_wait() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        config, placement, cpu = EngineConfig(), Placement.even(4), torch.device("cpu")
        team = workers.joined(config, placement, cpu)
        with pytest.raises(InputError, match=r"^this process is a rank of another model: close that one first$"):
            workers.joined(config, placement, cpu)
        team.close()
        team = workers.joined(config, placement, cpu)  # closed, it is in nobody's way
        del team
        workers.joined(config, placement, cpu).close()  # nor is one that nobody has any more
    finally:
        torch.distributed.destroy_process_group()


SCRIPT = """
import json, sys
import torch
import tersor
from helpers.asked import OPTIONS, answers, same
torch.set_num_threads(1)
model = tersor.LLM(sys.argv[1], tensor_parallel=3, **OPTIONS)
print(json.dumps(answers(model)))
model.close()
"""


def test_three_processes_of_torchrun_answer_once(path: Path, wanted: list[Any], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", str(script)]
    tests, sources = Path(__file__).resolve().parents[1], Path(tersor.__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{sources}:{tests}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    same(json.loads(done.stdout), [list(one) for one in wanted])


class Wire(Ranks):
    """Two ranks in one process: what the first sends is read by the second, in order."""

    def __init__(self, rank: int, sent: list[torch.Tensor]) -> None:
        super().__init__(rank, 2)
        self.sent = sent

    def from_first(self, x: torch.Tensor, group: object = None) -> torch.Tensor:
        if self.first:
            self.sent.append(x.clone())
            return x
        return x.copy_(self.sent.pop(0))


@pytest.mark.parametrize("pages", [1, 100, 3000])
def test_a_step_of_any_size_arrives_whole(pages: int) -> None:
    sent: list[torch.Tensor] = []
    group: Any = None
    first, other = (Line(Wire(rank, sent), group) for rank in range(2))
    orders = [Order(0, 40, 2, pages, 0, 1, 7, 2, 9, 1, 3, 39, 1, 64), Order(2, 2, 2, 5, 1, 2, 0, 0, 0, 0, 0, 1, 1, 320)]
    for order in orders:
        buffer = torch.randint(-9, 99, (order.size,), dtype=torch.int32)
        first.tell(order, buffer)
        assert other.order() == order
        found = torch.zeros_like(buffer)
        other.read(found)
        assert torch.equal(found, buffer)
    first.end()
    assert other.order() == END and not sent
