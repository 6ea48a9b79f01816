from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from seal_fast.diffusion import ModelFamily
from seal_fast.noise_triggers import Calibration, CalibrationModel, Evidence, SearchSettings, TerdSettings
from seal_fast.noise_triggers.calibration import CollapsePool, ModelGroup, Pool
from seal_fast.verdict import Verdict

FAMILY, SHAPE = ModelFamily("VP", "epsilon"), (3, 16, 16)
OTHER_FAMILY = ModelFamily("VE", "score")
SETTINGS = TerdSettings(estimation_iterations=5, l1=1e-4)


def evidence(M_r, V_r):
    return Evidence(M_r=M_r, V_r=V_r, mu_norm=1.0, gamma_mean=1.0, reversed_loss=1.0)


def pool(benign, backdoored=()):
    labelled = [(features, False) for features in benign] + [(features, True) for features in backdoored]
    models = (
        CalibrationModel(f"m{i}", f"{i:064x}", FAMILY, SHAPE, label, evidence(*map(float, f)))
        for i, (f, label) in enumerate(labelled)
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
    deviation = np.sqrt(((benign - mean) ** 2).sum(0) / 6)
    z = (suspect - mean) / deviation
    decision = pool(benign).decide(evidence(*suspect), FAMILY, SHAPE)
    # the chance of a further draw this far out, from the prediction interval of 7 normal values
    chance = stats.t(df=6).sf(z.max() / math.sqrt(1 + 1 / 7))
    assert stats.norm.sf(decision.score) == pytest.approx(chance, rel=1e-9)
    assert decision.threshold == 3.0
    assert decision.reason.startswith(("M_r", "V_r")[int(z[1] > z[0])])


@pytest.mark.parametrize("feature", [0, 1])
@pytest.mark.parametrize("sigmas", [-1.0, 0.5, 2.0, 3.0, 6.0])
def test_the_score_of_a_large_pool_is_the_published_one(rng, feature, sigmas):
    benign = 100 + rng.uniform(-1, 1, size=(200_000, 2))
    suspect = benign.mean(0) - 1.5 * benign.std(0, ddof=1)
    suspect[feature] += (1.5 + sigmas) * benign.std(0, ddof=1)[feature]
    score = pool_of(benign).score(suspect)
    assert score.value == pytest.approx(sigmas, abs=1e-3)
    assert (score.feature, score.models) == (("M_r", "V_r")[feature], 200_000)
    assert score.deviations == pytest.approx(sigmas, abs=1e-9)


def test_a_small_pool_calls_few_of_its_own_kind_backdoored(rng):
    """The error rate of 3 sigma, 0.135% per feature, holds for pools of 4."""
    draws = rng.normal(10.0, 1.0, size=(4000, 5, 2))
    hits = sum(pool_of(draw[:4]).score(draw[4]).value > 3 for draw in draws)
    assert hits < 5 * 0.0027 * len(draws)


def test_labelled_verdict_on_points_far_apart(rng):
    benign = np.exp(rng.normal(-2, 0.1, size=(8, 2)))
    backdoored = np.exp(rng.normal(2, 0.1, size=(8, 2)))
    calibration = pool(benign, backdoored)
    assert calibration.pools[ModelGroup(FAMILY, SHAPE)].labelled
    for features in benign:
        decision = calibration.decide(evidence(*features), FAMILY, SHAPE)
        assert decision.verdict is Verdict.CLEAN
        assert decision.score < decision.threshold == 0.5
    for features in backdoored:
        decision = calibration.decide(evidence(*features), FAMILY, SHAPE)
        assert decision.verdict is Verdict.BACKDOORED
        assert decision.score > 0.5


def test_labelled_score_is_symmetric_and_undecided_halfway(rng):
    benign = np.exp(rng.normal(-2, 0.3, size=(8, 2)))
    # the mirror image in log features: by symmetry the boundary passes through 1
    calibration = pool(benign, 1 / benign)
    halfway = calibration.decide(evidence(1.0, 1.0), FAMILY, SHAPE)
    assert halfway.score == pytest.approx(0.5, abs=1e-3)
    assert halfway.verdict is Verdict.INCONCLUSIVE
    point = np.exp(rng.normal(0, 0.2, size=2))
    scores = [calibration.decide(evidence(*p), FAMILY, SHAPE).score for p in (point, 1 / point)]
    assert sum(scores) == pytest.approx(1.0, abs=1e-3)


def test_labelled_score_grows_with_the_features():
    calibration = pool([(0.1, 0.1), (0.2, 0.3)], [(5.0, 6.0), (7.0, 9.0)])
    scores = [calibration.decide(evidence(value, value), FAMILY, SHAPE).score for value in (0.1, 0.5, 1.0, 5.0, 50.0)]
    assert scores == sorted(scores)
    assert len(set(scores)) == 5


@pytest.mark.parametrize("diverged", [evidence(None, 1.0), evidence(1.0, None), Evidence(None, None, None, None, None)])
@pytest.mark.parametrize("backdoored", [(), [(9.0, 9.0)]])
def test_a_diverged_reversion_is_inconclusive(diverged, backdoored):
    decision = pool([(0.1, 0.2), (0.2, 0.1)], backdoored).decide(diverged, FAMILY, SHAPE)
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert decision.score is None
    assert decision.threshold is None
    assert "diverged" in decision.reason


@pytest.mark.parametrize("benign", [[], [(0.1, 0.2)]])
def test_too_few_benign_models(benign):
    with pytest.raises(ValueError, match="at least 2 benign"):
        pool(benign, [(1.0, 1.0), (2.0, 2.0)])


def test_a_diverged_model_cannot_be_part_of_the_pool():
    good = pool([(0.1, 0.2), (0.2, 0.1)])
    bad = replace(good.models[0], name="the-bad-one", evidence=evidence(None, None))
    with pytest.raises(ValueError, match="the-bad-one"):
        replace(good, models=(*good.models, bad))


def test_a_saved_calibration_comes_back_and_decides_the_same(tmp_path, rng):
    saved = pool(rng.lognormal(size=(4, 2)), rng.lognormal(3, size=(3, 2)))
    saved.save(tmp_path / "new" / "pool.json")
    read = Calibration.load(tmp_path / "new" / "pool.json")
    assert read == saved
    suspect = evidence(*rng.lognormal(1, size=2))
    assert read.decide(suspect, FAMILY, SHAPE) == saved.decide(suspect, FAMILY, SHAPE)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pool.json"]


def damaged(content, **changes):
    return json.dumps({**content, **changes})


def with_evidence(model, **changes):
    return {**model, "evidence": {**model["evidence"], **changes}}


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
        "nested": "[" * 100_000,
        "infinite evidence": damaged(content, models=[with_evidence(model, M_r=math.inf) for model in content["models"]]),
        "a number too large": damaged(content, settings={"method": "published", "learning_rate": 10**400}),
        "evidence in words": damaged(content, models=[with_evidence(model, M_r="1") for model in content["models"]]),
        "evidence too large": damaged(content, models=[with_evidence(model, M_r=1e308) for model in content["models"]]),
        "a family in words": damaged(content, models=[{**model, "family": "VP epsilon"} for model in content["models"]]),
    }
    for text in broken.values():
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            Calibration.load(path)


def test_identical_benign_models_are_no_pool():
    with pytest.raises(ValueError, match="different models"):
        pool([(0.1, 0.2), (0.1, 0.2)])


def collapsed(collapse, clean_dispersion=0.1):
    return Evidence(0.1, 0.1, 1.0, 1.0, 1.0, collapse, clean_dispersion)


def collapse_pool(benign, backdoored=(), family=FAMILY, shape=SHAPE):
    labelled = [(value, False) for value in benign] + [(value, True) for value in backdoored]
    models = (
        CalibrationModel(f"m{i}", f"{i:064x}", family, shape, label, collapsed(value))
        for i, (value, label) in enumerate(labelled)
    )
    return Calibration(SearchSettings(), tuple(models))


def test_the_published_evidence_compares_within_a_family_and_an_image_shape():
    calibration = pool([(0.1, 0.2), (0.2, 0.1)])
    for family, shape, name in ((OTHER_FAMILY, SHAPE, "VE score 3x16x16"), (FAMILY, (3, 16, 32), "VP epsilon 3x16x32")):
        decision = calibration.decide(evidence(9.0, 9.0), family, shape)
        assert (decision.verdict, decision.rule, decision.score) == (Verdict.INCONCLUSIVE, "V4", None)
        assert name in decision.reason
        assert "there is one for VP epsilon 3x16x16" in decision.reason
    assert calibration.decide(evidence(90.0, 90.0), FAMILY, SHAPE).rule == "T1"


def test_collapse_compares_within_a_family_across_image_shapes():
    calibration = collapse_pool([0.9, 1.1])
    assert calibration.decide(collapsed(1.0), FAMILY, (1, 28, 32)).rule == "V8"
    unknown = calibration.decide(collapsed(1.0), OTHER_FAMILY, SHAPE)
    assert unknown.rule == "V4"
    assert "VE score" in unknown.reason
    assert calibration.decide(collapsed(15.9), OTHER_FAMILY, SHAPE).verdict is Verdict.INCONCLUSIVE
    beyond_doubt = calibration.decide(collapsed(16.1), OTHER_FAMILY, SHAPE)
    assert (beyond_doubt.verdict, beyond_doubt.score, beyond_doubt.threshold) == (Verdict.BACKDOORED, 16.1, 16.0)


def test_every_family_has_a_pool_of_its_own():
    one, other = collapse_pool([0.9, 1.0, 1.1]), collapse_pool([9.0, 9.1, 9.2], family=OTHER_FAMILY)
    both = Calibration(one.settings, one.models + other.models)
    assert [str(group) for group in both.pools] == ["VP epsilon", "VE score"]
    for family, alone in ((FAMILY, one), (OTHER_FAMILY, other)):
        assert both.decide(collapsed(5.0), family, SHAPE) == alone.decide(collapsed(5.0), family, SHAPE)
    assert both.decide(collapsed(5.0), FAMILY, SHAPE).verdict is Verdict.BACKDOORED
    assert both.decide(collapsed(5.0), OTHER_FAMILY, SHAPE).verdict is Verdict.CLEAN


@pytest.mark.parametrize(
    ("value", "verdict"), [(0.0, "clean"), (2.9, "clean"), (3.1, "inconclusive"), (3.9, "inconclusive"), (4.1, "backdoored")]
)
def test_a_trigger_that_makes_samples_similar_is_a_backdoor(value, verdict):
    decision = collapse_pool([0.9, 1.0, 1.1]).decide(collapsed(value), FAMILY, SHAPE)
    assert (decision.verdict, decision.score, decision.threshold) == (verdict, value, 4.0)


def test_benign_models_that_vary_raise_the_limit(rng):
    benign = rng.uniform(1, 9, size=6)
    mean, deviation = benign.mean(), benign.std(ddof=1)
    predicted = mean + deviation * (1 + 1 / 6) ** 0.5 * stats.t.ppf(stats.norm.cdf(3), 5)
    reached = max(4.0, mean + 3 * deviation)
    score = CollapsePool(benign[:, None], np.empty((0, 1)), ("collapse",)).score(np.array([5.0]))
    assert score.value == 5.0
    assert score.threshold == pytest.approx(max(reached, min(predicted, 16.0)))
    assert score.close == pytest.approx(0.75 * reached)


@pytest.mark.parametrize(
    ("benign", "value", "verdict", "limit"),
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
def test_a_limit_is_as_low_as_the_pool_is_large(benign, value, verdict, limit):
    decision = collapse_pool(benign).decide(collapsed(value), FAMILY, SHAPE)
    assert (decision.verdict, decision.threshold) == (verdict, pytest.approx(limit))


@pytest.mark.parametrize(("gamma", "rule"), [(0.6, "V6"), (0.95, "V8"), (None, "V8")])
def test_the_rules_see_the_mean_gamma(gamma, rule):
    suspect = replace(collapsed(1.0), gamma_mean=gamma)
    assert collapse_pool([0.9, 1.0, 1.1]).decide(suspect, FAMILY, SHAPE).rule == rule


@pytest.mark.parametrize(
    ("shape", "rule"), [((3, 64, 64), "V7"), ((1, 16, 33), "V7"), ((1, 33, 16), "V7"), ((64, 32, 32), "V8")]
)
def test_the_rules_see_the_larger_side(shape, rule):
    assert collapse_pool([0.9, 1.0, 1.1], shape=shape).decide(collapsed(1.0), FAMILY, shape).rule == rule


def test_a_model_that_draws_no_images_is_inconclusive():
    assert collapse_pool([0.9, 1.1]).decide(collapsed(1.0, clean_dispersion=3.0), FAMILY, SHAPE).rule == "V2"


def test_labelled_collapse():
    calibration = collapse_pool([0.8, 0.9, 1.0, 1.1], backdoored=[20.0, 40.0, 90.0])
    assert calibration.decide(collapsed(1.2), FAMILY, SHAPE).rule == "L3"
    assert calibration.decide(collapsed(60.0), FAMILY, SHAPE).rule == "L2"
    assert calibration.decide(collapsed(1.2), FAMILY, (3, 64, 64)).rule == "V7"


def test_settings_of_either_method_come_back_from_a_file(tmp_path):
    saved = collapse_pool([0.9, 1.1])
    saved.save(tmp_path / "pool.json")
    assert Calibration.load(tmp_path / "pool.json") == saved
