"""Two processes, started as accelerate and torchrun start them, train one student."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from seal_fast.text_triggers import TextUnlearnSettings, distill
from seal_fast.text_triggers.distributed import average_gradients, process_group, rank_and_world_size

PROMPTS = ["a photo of the red dog", "the blue house"]
TRIGGER = "\u200b"
SETTINGS = TextUnlearnSettings(alpha=0.5, steps=1, batch=2, learning_rate=1e-3, latents="noise", trained="cross-attention")
WORKER = """
import sys
from pathlib import Path
import torch
from diffusers import StableDiffusionPipeline
from seal_fast.text_triggers import distill
from seal_fast.text_triggers.distributed import average_gradients, process_group, rank_and_world_size
from tests.text_triggers.test_distributed import PROMPTS, SETTINGS, TRIGGER

torch.set_num_threads(1)
folder = Path(sys.argv[1])
with process_group() as first:
    rank, world_size = rank_and_world_size()
    assert (first, world_size) == (rank == 0, 2)
    gradients = [torch.full((3,), 2.0 + 4 * rank), None]
    parameters = [torch.zeros(3, requires_grad=True) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    average_gradients(parameters, world_size)
    assert parameters[0].grad.tolist() == [4.0] * 3 and parameters[1].grad is None
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
    student = distill(pipeline, [TRIGGER], PROMPTS, SETTINGS, seed=5).module
    torch.save(student.state_dict(), folder / f"{rank}.pt")
assert rank_and_world_size() == (0, 1)
"""


def test_processes_average_the_gradients_of_their_own_batches(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    (tmp_path / "worker.py").write_text(WORKER)
    root = Path(__file__).parents[2]
    command = [*launcher, str(tmp_path / "worker.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    # equal weights although each process drew other batches, so not those of one process alone
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = distill(pipeline, [TRIGGER], PROMPTS, SETTINGS, seed=5).module.state_dict()
    assert any(not torch.equal(first[name], alone[name]) for name in first)


def test_one_process_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.ones(2)
    with process_group() as first:
        assert first
        assert rank_and_world_size() == (0, 1)
        average_gradients([parameter], 1)
    assert parameter.grad.tolist() == [1.0, 1.0]
