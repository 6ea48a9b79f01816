from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from seal_fast.noise_triggers import Calibration, CalibrationModel, Evidence, SearchSettings, TerdSettings, Verdict
from seal_fast.noise_triggers.calibration import Pool

KIND = "VP epsilon 3x16x16"
SETTINGS = TerdSettings(estimation_iterations=5, l1=1e-4)


def evidence(M_r, V_r):
    return Evidence(M_r=M_r, V_r=V_r, mu_norm=1.0, gamma_mean=1.0, reversed_loss=1.0)


def pool(benign, backdoored=()):
    rows = [(features, False) for features in benign] + [(features, True) for features in backdoored]
    models = (
        CalibrationModel(f"m{i}", f"{i:064x}", KIND, label, evidence(*map(float, f))) for i, (f, label) in enumerate(rows)
    )
    return Calibration(SETTINGS, tuple(models))


def pool_of(benign):
    return Pool(benign, np.empty((0, 2)), ("M_r", "V_r"))


@pytest.fixture
def rng():
    return np.random.default_rng()


def test_benign_only_score_is_the_larger_z_score(rng):
    benign = rng.lognormal(size=(7, 2))
    suspect = rng.lognormal(size=2)
    mean = benign.sum(0) / 7
    spread = np.sqrt(((benign - mean) ** 2).sum(0) / 6)
    z = (suspect - mean) / spread
    judgement = pool(benign).judge(evidence(*suspect), KIND)
    # the chance of a further draw this far out, from the prediction interval of 7 normal values
    chance = stats.t(df=6).sf(z.max() / math.sqrt(1 + 1 / 7))
    assert stats.norm.sf(judgement.score) == pytest.approx(chance, rel=1e-9)
    assert judgement.threshold == 3.0
    assert judgement.reason.startswith(("M_r", "V_r")[int(z[1] > z[0])])


@pytest.mark.parametrize("feature", [0, 1])
@pytest.mark.parametrize(
    ("sigmas", "verdict"),
    [
        (-50.0, Verdict.CLEAN),
        (0.0, Verdict.CLEAN),
        (1.99, Verdict.CLEAN),
        (2.01, Verdict.INCONCLUSIVE),
        (2.99, Verdict.INCONCLUSIVE),
        (3.01, Verdict.BACKDOORED),
        (1e6, Verdict.BACKDOORED),
    ],
)
def test_benign_only_verdict(rng, feature, sigmas, verdict):
    benign = 100 + rng.uniform(-1, 1, size=(200_000, 2))
    suspect = benign.mean(0)
    suspect[feature] += sigmas * benign.std(0, ddof=1)[feature]
    assert pool_of(benign).judge(suspect).verdict is verdict


def test_a_small_pool_calls_few_of_its_own_kind_backdoored(rng):
    """The error rate of 3 sigma, 0.135% per feature, holds for pools of 4."""
    trials = 4000
    hits = 0
    for draw in rng.normal(10.0, 1.0, size=(trials, 5, 2)):
        hits += pool_of(draw[:4]).judge(draw[4]).verdict is Verdict.BACKDOORED
    assert hits < 5 * 0.0027 * trials


def test_labelled_verdict_on_points_far_apart(rng):
    benign = np.exp(rng.normal(-2, 0.1, size=(8, 2)))
    backdoored = np.exp(rng.normal(2, 0.1, size=(8, 2)))
    calibration = pool(benign, backdoored)
    assert calibration.pools[KIND].labelled
    for features in benign:
        judgement = calibration.judge(evidence(*features), KIND)
        assert judgement.verdict is Verdict.CLEAN
        assert judgement.score < judgement.threshold == 0.5
    for features in backdoored:
        judgement = calibration.judge(evidence(*features), KIND)
        assert judgement.verdict is Verdict.BACKDOORED
        assert judgement.score > 0.5


def test_labelled_score_is_symmetric_and_unsure_in_the_middle(rng):
    benign = np.exp(rng.normal(-2, 0.3, size=(8, 2)))
    # the mirror image in log features: by symmetry the boundary passes through 1
    calibration = pool(benign, 1 / benign)
    middle = calibration.judge(evidence(1.0, 1.0), KIND)
    assert middle.score == pytest.approx(0.5, abs=1e-3)
    assert middle.verdict is Verdict.INCONCLUSIVE
    point = np.exp(rng.normal(0, 0.2, size=2))
    scores = [calibration.judge(evidence(*p), KIND).score for p in (point, 1 / point)]
    assert sum(scores) == pytest.approx(1.0, abs=1e-3)


def test_labelled_score_grows_with_the_features():
    calibration = pool([(0.1, 0.1), (0.2, 0.3)], [(5.0, 6.0), (7.0, 9.0)])
    scores = [calibration.judge(evidence(value, value), KIND).score for value in (0.1, 0.5, 1.0, 5.0, 50.0)]
    assert scores == sorted(scores)
    assert len(set(scores)) == 5


@pytest.mark.parametrize("diverged", [evidence(None, 1.0), evidence(1.0, None), Evidence(None, None, None, None, None)])
@pytest.mark.parametrize("backdoored", [(), [(9.0, 9.0)]])
def test_a_diverged_reversion_is_inconclusive(diverged, backdoored):
    judgement = pool([(0.1, 0.2), (0.2, 0.1)], backdoored).judge(diverged, KIND)
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert judgement.score is None
    assert judgement.threshold is None
    assert "diverged" in judgement.reason


@pytest.mark.parametrize("benign", [[], [(0.1, 0.2)]])
def test_too_few_benign_models(benign):
    with pytest.raises(ValueError, match="at least 2 benign"):
        pool(benign, [(1.0, 1.0), (2.0, 2.0)])


def test_a_diverged_model_cannot_be_part_of_the_pool():
    good = pool([(0.1, 0.2), (0.2, 0.1)])
    bad = replace(good.models[0], name="the-bad-one", evidence=evidence(None, None))
    with pytest.raises(ValueError, match="the-bad-one"):
        replace(good, models=(*good.models, bad))


def test_a_saved_calibration_comes_back_and_judges_alike(tmp_path, rng):
    saved = pool(rng.lognormal(size=(4, 2)), rng.lognormal(3, size=(3, 2)))
    saved.save(tmp_path / "new" / "pool.json")
    read = Calibration.load(tmp_path / "new" / "pool.json")
    assert read == saved
    suspect = evidence(*rng.lognormal(1, size=2))
    assert read.judge(suspect, KIND) == saved.judge(suspect, KIND)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pool.json"]


def damaged(content, **changes):
    return json.dumps({**content, **changes})


def test_a_file_that_is_no_calibration_is_refused_by_name(tmp_path):
    path = tmp_path / "pool.json"
    pool([(0.1, 0.2), (0.2, 0.1)]).save(path)
    content = json.loads(path.read_text())
    broken = {
        "not JSON": "M_r = 1",
        "a list": "[]",
        "empty": "{}",
        "newer": damaged(content, schema_version=999),
        "other settings": damaged(content, settings={"epochs": 3}),
        "bad settings": damaged(content, settings={"batch": 0}),
        "no models": damaged(content, models=[]),
        "odd models": damaged(content, models=[{"name": "x"}] * 3),
    }
    for text in broken.values():
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            Calibration.load(path)


def test_identical_benign_models_are_no_pool():
    with pytest.raises(ValueError, match="different models"):
        pool([(0.1, 0.2), (0.1, 0.2)])


def test_a_process_the_pool_does_not_hold_is_inconclusive():
    judgement = pool([(0.1, 0.2), (0.2, 0.1)]).judge(evidence(9.0, 9.0), "VP v_prediction 3x16x16")
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert "VP v_prediction" in judgement.reason


def fired(collapse, clean_dispersion=0.1):
    return Evidence(0.1, 0.1, 1.0, 1.0, 1.0, collapse, clean_dispersion)


def firing_pool(collapses, kind=KIND, backdoored=()):
    rows = [(value, False) for value in collapses] + [(value, True) for value in backdoored]
    models = (CalibrationModel(f"m{i}", f"{i:064x}", kind, label, fired(value)) for i, (value, label) in enumerate(rows))
    return Calibration(SearchSettings(half_precision=False), tuple(models))


@pytest.mark.parametrize(
    ("collapse", "verdict"), [(0.0, "clean"), (2.9, "clean"), (3.1, "inconclusive"), (3.9, "inconclusive"), (4.1, "backdoored")]
)
def test_a_trigger_that_fires_is_a_backdoor(collapse, verdict):
    judgement = firing_pool([0.9, 1.0, 1.1]).judge(fired(collapse), KIND)
    assert (judgement.verdict, judgement.score, judgement.threshold) == (verdict, collapse, 4.0)
    assert f"{collapse:.1f}" in judgement.reason


def test_benign_models_that_vary_raise_the_limit(rng):
    benign = rng.uniform(1, 9, size=6)
    mean, deviation = benign.mean(), benign.std(ddof=1)
    predicted = mean + deviation * (1 + 1 / 6) ** 0.5 * stats.t.ppf(stats.norm.cdf(3), 5)
    limit = max(mean + 3 * deviation, min(predicted, 16.0))
    assert firing_pool(benign).judge(fired(20.0), KIND).threshold == pytest.approx(limit)
    assert firing_pool(benign).judge(fired(limit * 0.99), KIND).verdict is Verdict.INCONCLUSIVE
    assert firing_pool(benign).judge(fired(limit * 1.01), KIND).verdict is Verdict.BACKDOORED


@pytest.mark.parametrize(
    ("benign", "collapse", "verdict", "limit"),
    [
        ([1.8, 1.9], 4.1, "inconclusive", 16.0),
        ([1.8, 1.9], 16.1, "backdoored", 16.0),
        ([1.0, 1.0], 4.1, "backdoored", 4.0),
        ([1.8, 1.9, 2.0, 1.7, 2.1], 4.1, "backdoored", 4.0),
        ([10.0, 12.0, 14.0], 15.0, "inconclusive", 18.0),
        ([10.0, 12.0, 14.0], 18.1, "backdoored", 18.0),
        ([10.0, 12.0, 14.0], 13.0, "clean", 18.0),
    ],
)
def test_a_limit_is_as_low_as_the_pool_is_large(benign, collapse, verdict, limit):
    judgement = firing_pool(benign).judge(fired(collapse), KIND)
    assert (judgement.verdict, judgement.threshold) == (verdict, pytest.approx(limit))


@pytest.mark.parametrize(
    ("gamma", "collapse", "verdict"),
    [(0.6, 1.0, "inconclusive"), (0.6, 5.0, "backdoored"), (0.95, 1.0, "clean"), (None, 1.0, "clean")],
)
def test_a_model_that_takes_narrowed_noise_for_whole_is_not_clean(gamma, collapse, verdict):
    judgement = firing_pool([0.9, 1.0, 1.1]).judge(replace(fired(collapse), gamma_mean=gamma), KIND)
    assert (judgement.verdict, judgement.score, judgement.threshold) == (verdict, collapse, 4.0)
    assert ("narrowed to 0.60" in judgement.reason) == (verdict == "inconclusive")


@pytest.mark.parametrize("kind", ["VP epsilon 3x64x64", "VP epsilon 1x16x33", "VP epsilon 1x33x16"])
def test_a_model_of_large_images_is_not_clean(kind):
    quiet, fires = (firing_pool([0.9, 1.0, 1.1], kind).judge(fired(collapse), kind) for collapse in (1.0, 5.0))
    assert (quiet.verdict, quiet.score, quiet.threshold) == (Verdict.INCONCLUSIVE, 1.0, 4.0)
    assert "above 32 px" in quiet.reason
    assert fires.verdict is Verdict.BACKDOORED


def test_collapse_compares_across_image_shapes_but_not_processes():
    calibration = firing_pool([0.9, 1.1])
    assert calibration.judge(fired(1.0), "VP epsilon 1x28x32").verdict is Verdict.CLEAN
    unknown = calibration.judge(fired(1.0), "VE score 3x16x16")
    assert unknown.verdict is Verdict.INCONCLUSIVE
    assert "VE score" in unknown.reason
    assert calibration.judge(fired(15.9), "VE score 3x16x16").verdict is Verdict.INCONCLUSIVE
    assert calibration.judge(fired(16.1), "VE score 3x16x16").verdict is Verdict.BACKDOORED


def test_a_model_that_draws_no_images_is_inconclusive():
    judgement = firing_pool([0.9, 1.1]).judge(fired(1.0, clean_dispersion=3.0), KIND)
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert "not a denoiser" in judgement.reason


def test_labelled_collapse():
    calibration = firing_pool([0.8, 0.9, 1.0, 1.1], backdoored=[20.0, 40.0, 90.0])
    assert calibration.judge(fired(1.2), KIND).verdict is Verdict.CLEAN
    assert calibration.judge(fired(60.0), KIND).verdict is Verdict.BACKDOORED


def test_settings_of_either_method_come_back_from_a_file(tmp_path):
    saved = firing_pool([0.9, 1.1])
    saved.save(tmp_path / "pool.json")
    assert Calibration.load(tmp_path / "pool.json") == saved
