from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from seal_fast.checkpoints import CheckpointError
from seal_fast.noise_triggers import Evidence
from seal_fast.workflows.calibrate import leave_one_out, measure
from seal_fast.workflows.discovery import find_checkpoints


def evidence(M_r, V_r):
    return Evidence(M_r=M_r, V_r=V_r, mu_norm=1.0, gamma_mean=1.0, reversed_loss=1.0)


def run(benign, backdoored, settings, seen=None):
    return measure(
        find_checkpoints(benign),
        find_checkpoints(backdoored),
        settings,
        seed=0,
        on_progress=lambda at: None,
        on_model=lambda model, index, total: None if seen is None else seen.append((model.name, index, total)),
    )


def decide(pool, suspect):
    return pool.decide(suspect, pool.models[0].family, pool.models[0].shape)


def test_pool_holds_what_a_scan_would_measure(write_model, loud_model, quiet_evidence, calibration, tmp_path):
    for seed in range(3):
        write_model(tmp_path / "benign" / str(seed), seed)
    seen = []
    pool = run([tmp_path / "benign"], [loud_model], calibration.settings, seen)
    assert [(model.name, model.backdoored) for model in pool.models] == [
        ("0", False),
        ("1", False),
        ("2", False),
        ("model", True),
    ]
    assert pool.models[0].evidence == quiet_evidence
    assert seen == [("0", 1, 4), ("1", 2, 4), ("2", 3, 4), ("model", 4, 4)]


def test_a_bad_model_stops_it_by_name(quiet_model, corrupt, tmp_path, calibration):
    seen = []
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        run([quiet_model, corrupt(tmp_path / "bad.safetensors")], [], calibration.settings, seen)
    assert len(seen) == 1


def test_limits_are_where_the_verdict_turns(calibration):
    rng = np.random.default_rng()
    features = rng.uniform(0.1, 1.0, (6, 2))
    models = tuple(
        replace(calibration.models[0], name=str(i), evidence=evidence(m, v)) for i, (m, v) in enumerate(features.tolist())
    )
    pool = replace(calibration, models=models)
    (found,) = (one.limits for one in pool.pools.values())
    student = stats.t(df=5).isf(stats.norm.sf(3))
    expected = features.mean(0) + student * (1 + 1 / 6) ** 0.5 * features.std(0, ddof=1)
    np.testing.assert_allclose([found["M_r"], found["V_r"]], expected, rtol=1e-9)
    quiet = features.mean(0)
    for index, name in enumerate(("M_r", "V_r")):
        for factor, verdict in ((1.001, "backdoored"), (0.999, "inconclusive")):
            values = quiet.copy()
            values[index] = found[name] * factor
            assert decide(pool, evidence(*values)).verdict == verdict


def test_each_benign_model_is_decided_without_itself(calibration):
    values = [0.10, 0.11, 0.12, 0.13, 5.0]
    models = tuple(replace(calibration.models[0], name=str(i), evidence=evidence(v, v)) for i, v in enumerate(values))
    verdicts = [decision.verdict for _, decision in leave_one_out(replace(calibration, models=models))]
    assert verdicts == ["clean"] * 4 + ["backdoored"]


def test_two_models_are_too_few_to_leave_one_out(calibration):
    assert leave_one_out(replace(calibration, models=calibration.models[:2])) == []
