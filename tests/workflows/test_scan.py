from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import seal_fast
from seal_fast import scan
from seal_fast.checkpoints import load_denoiser
from seal_fast.diffusion import ModelFamily
from seal_fast.noise_triggers import reverse_trigger
from seal_fast.workflows.trigger_files import sample_images

FAMILY = ModelFamily("VP", "epsilon")


def test_one_result_per_model_whatever_happens_to_the_others(hub, calibration, tmp_path):
    report = scan(hub, calibration=calibration, out=tmp_path / "out")
    verdicts = {model.path: model.verdict.value for model in report.models}
    assert verdicts == {
        "a-quiet": "clean",
        "b-broken.safetensors": "error",
        "c-loud": "backdoored",
        "d-diverging": "inconclusive",
    }
    assert report.summary == {"clean": 1, "backdoored": 1, "inconclusive": 1, "error": 1}
    assert [model.rule for model in report.models] == ["T3", None, "T1", "V1"]
    assert [model.family for model in report.models] == [FAMILY, None, FAMILY, FAMILY]
    broken, diverging = report.models[1], report.models[3]
    assert broken.error == broken.reason != ""
    assert str(tmp_path) not in broken.error
    assert diverging.trigger is None
    assert diverging.score is None


def test_verdict_and_trigger_are_those_of_a_reversion_with_the_calibration_s_settings(quiet_model, calibration, tmp_path):
    (result,) = scan(quiet_model, calibration=calibration, seed=7, out=tmp_path).models
    expected = reverse_trigger(load_denoiser(quiet_model).denoiser, calibration.settings, seed=7).trigger
    kept = load_file(tmp_path / result.trigger)
    torch.testing.assert_close(kept["mu"], expected.mu, rtol=0, atol=0)
    torch.testing.assert_close(kept["gamma"], expected.gamma, rtol=0, atol=0)
    mu, g = expected.mu.double(), expected.gamma.double()
    kl = 0.5 * (mu**2 + g**2 - 1) - g.log()
    assert result.evidence.M_r == pytest.approx(kl.mean().item(), rel=1e-6)
    assert result.evidence.V_r == pytest.approx(kl.var(correction=0).item(), rel=1e-6)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"trigger.safetensors", "trigger.png", "samples.png"}


def test_report_on_disk_grows_with_every_model(hub, calibration, tmp_path):
    seen = []

    def on_result(model, index, total):
        written = json.loads((tmp_path / "out" / "report.json").read_text())
        seen.append([model["path"] for model in written["models"]])
        assert seen[-1][-1] == model.path
        assert (len(seen[-1]), total) == (index, 4)

    scan([hub], calibration=calibration, out=tmp_path / "out", on_result=on_result)
    assert [len(paths) for paths in seen] == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a-quiet", "c-loud", "report.json"]


def test_an_interrupt_stops_the_scan_and_the_next_one_goes_on_from_there(hub, calibration, tmp_path):
    def on_progress(at):
        if at.index == 3 and at.stage == "refinement":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(hub, calibration=calibration, out=tmp_path / "out", on_progress=on_progress)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [model["path"] for model in written["models"]] == ["a-quiet", "b-broken.safetensors"]
    scanned = []
    report = scan(hub, calibration=calibration, out=tmp_path / "out", on_progress=lambda at: scanned.append(at.model))
    assert set(scanned) == {"b-broken.safetensors", "c-loud", "d-diverging"}
    assert [result.verdict.value for result in report.models] == ["clean", "error", "backdoored", "inconclusive"]
    assert (report.models[0].rule, report.models[0].family) == ("T3", FAMILY)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no kernel"), ValueError("bad"), RecursionError("deep")])
def test_an_unforeseen_error_is_one_result(hub, calibration, error):
    def on_progress(at):
        if at.index == 1 and at.stage == "estimation":
            raise error

    first, *others = scan(hub, calibration=calibration, on_progress=on_progress).models
    assert first.verdict == "error"
    assert type(error).__name__ in first.error
    assert first.sha256 is not None
    assert others[1].verdict == "backdoored"


def test_images_that_cannot_be_written_do_not_hide_the_verdict(loud_model, calibration, tmp_path):
    (tmp_path / "model").write_text("in the way")
    (result,) = scan(loud_model, calibration=calibration, out=tmp_path).models
    assert result.verdict == "backdoored"
    assert result.trigger is None
    assert any("not kept" in note for note in result.notes)


def test_a_model_named_like_the_report_cannot_take_its_place(quiet_model, calibration, tmp_path):
    for name in ("report.json", "report.json.partial", "z"):
        shutil.copytree(quiet_model, tmp_path / "hub" / name)
    report = scan(tmp_path / "hub", calibration=calibration, out=tmp_path / "out")
    assert report.summary["clean"] == 3
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["models"]) == 3


def test_progress_never_runs_back_and_ends_at_one(quiet_model, calibration):
    seen = []
    scan(quiet_model, calibration=calibration, on_progress=seen.append)
    fractions = [at.fraction for at in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert [at.stage for at in seen] == ["loading", "estimation", "estimation", "refinement", "images"]


def test_equal_seeds_give_equal_results(loud_model, calibration):
    first, second, other = (scan(loud_model, calibration=calibration, seed=seed).models[0] for seed in (3, 3, 4))
    assert first.evidence == second.evidence != other.evidence


def test_images_of_a_trigger_that_does_nothing_are_those_of_clean_noise(quiet_model):
    denoiser = load_denoiser(quiet_model).denoiser
    nothing = seal_fast.Trigger.shift(torch.zeros(denoiser.shape))
    clean, triggered = sample_images(denoiser, nothing, seed=0).values()
    assert triggered.equal(clean)


def test_the_public_call_is_the_function_of_the_workflow(quiet_model, calibration):
    from seal_fast.workflows.scan import scan as workflow

    assert seal_fast.scan is workflow
    assert seal_fast.scan(quiet_model, calibration=calibration).summary["clean"] == 1


def test_no_such_preset(tmp_path):
    with pytest.raises((ValueError, OSError), match="absent"):
        scan(tmp_path, preset="absent")
