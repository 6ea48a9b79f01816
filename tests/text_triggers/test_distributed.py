"""Two processes, started as accelerate and torchrun start them, train one student."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from seal_fast.text_triggers import TextTrigger, TextUnlearnSettings, distill
from seal_fast.text_triggers.distributed import joined, processes
from seal_fast.text_triggers.objectives import unet_objective
from seal_fast.text_triggers.trainer import _generator, _pairs

PROMPTS = ["a photo of the red dog", "the blue house"]
TRIGGER = "\u200b"
SETTINGS = TextUnlearnSettings(alpha=0.5, steps=1, batch=2, learning_rate=1e-3, latents="noise", trained="cross-attention")
WORKER = """
import sys
from pathlib import Path
import torch
from diffusers import StableDiffusionPipeline
from seal_fast.text_triggers import distill
from seal_fast.text_triggers.distributed import joined, processes
from tests.text_triggers.test_distributed import PROMPTS, SETTINGS, TRIGGER

torch.set_num_threads(1)
folder = Path(sys.argv[1])
with joined() as first:
    rank, count = processes()
    assert (first, count) == (rank == 0, 2)
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
    student = distill(pipeline, [TRIGGER], PROMPTS, SETTINGS, seed=5).module
    torch.save(student.state_dict(), folder / f"{rank}.pt")
assert processes() == (0, 1)
"""


def gradient(pipeline: StableDiffusionPipeline, rank: int) -> dict[str, Tensor]:
    """What a process of this rank has before the gradients meet."""
    student = type(pipeline.unet).from_config(pipeline.unet.config)
    student.load_state_dict(pipeline.unet.state_dict())
    student.eval()
    pairs = _pairs(pipeline.tokenizer, PROMPTS, [TextTrigger(TRIGGER)], SETTINGS, 5)
    with unet_objective(pipeline, student, pairs, SETTINGS, _generator(5, 1), lambda *_: None) as lesson:
        prediction, attention, preservation = lesson(_generator(5, 2, rank, 0))
        (0.5 * prediction + 0.5 * attention + preservation).backward()
    return {name: p.grad for name, p in student.named_parameters() if "attn2" in name and p.grad is not None}


def test_gradients_are_averaged_over_processes(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    (tmp_path / "worker.py").write_text(WORKER)
    root = Path(__file__).parents[2]
    command = [*launcher, str(tmp_path / "worker.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = distill(pipeline, [TRIGGER], PROMPTS, SETTINGS, seed=5).module.state_dict()
    assert any(not torch.equal(first[name], alone[name]) for name in first)

    # Adam's first step is the learning rate along g / (|g| + eps)
    one, other = (gradient(pipeline, rank) for rank in (0, 1))
    mean = {name: (one[name] + other[name]) / 2 for name in one}
    norm = torch.stack([g.norm() for g in mean.values()]).norm()
    for name, g in mean.items():
        g = g * min(1.0, 1.0 / (float(norm) + 1e-6))
        expected = pipeline.unet.state_dict()[name] - SETTINGS.learning_rate * g / (g.abs() + 1e-8)
        sure = g.abs() > 1e-5
        torch.testing.assert_close(first[name][sure], expected[sure], rtol=0, atol=2e-5)


def test_alone_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as first:
        assert first
        assert processes() == (0, 1)
