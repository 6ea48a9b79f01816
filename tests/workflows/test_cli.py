from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from seal_fast import __version__
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.cli import app
from seal_fast.noise_triggers import DEFAULT_PRESET, PRESETS, Calibration
from seal_fast.results.environment import environment


def invoke(*args, **env):
    return CliRunner().invoke(app, [str(arg) for arg in args], env=env)


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def scan(calibration_file):
    return lambda *args, **env: invoke("scan", "--jobs", 1, "--calibration", calibration_file, *args, **env)


def hub(folder, **models):
    for name, model in models.items():
        shutil.copytree(model, folder / name)
    return folder


# one test per exit code


def test_0_all_clean(scan, quiet_model):
    result = scan(quiet_model)
    assert result.exit_code == 0
    assert "clean" in result.stdout


def test_1_a_backdoor_even_if_others_failed(scan, tmp_path, quiet_model, loud_model, diverging_model, corrupt):
    folder = hub(tmp_path, clean=quiet_model, loud=loud_model, wild=diverging_model)
    corrupt(folder / "broken.safetensors")
    result = scan("--batch", folder)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "4 models: 1 clean, 1 backdoored, 1 inconclusive, 1 error"


def test_2_a_failure_among_clean_models(scan, tmp_path, quiet_model, corrupt):
    corrupt(hub(tmp_path, clean=quiet_model) / "broken.safetensors")
    result = scan("--batch", tmp_path)
    assert result.exit_code == 2
    assert "1 clean, 0 backdoored, 0 inconclusive, 1 error" in result.stdout


def test_2_inconclusive_and_fail_on_inconclusive_lifts_it_to_1(scan, diverging_model):
    assert scan(diverging_model).exit_code == 2
    assert scan(diverging_model, "--fail-on", "inconclusive").exit_code == 1


def test_3_nothing_to_scan(scan, tmp_path):
    for options in ([], ["--exit-zero"]):
        result = scan("--batch", tmp_path, "--format", "json", *options)
        assert result.exit_code == 3
        assert strict(result.stdout)["models"] == []
        assert "nothing to scan" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["{absent}"],
        ["{model}", "{absent}"],
        ["--batch", "{absent}"],
        ["--batch", "{file}"],
        ["{model}", "--format", "sarif"],
        ["{model}", "--preset", "absent"],
        ["{model}", "--preset", "published"],
        ["{model}", "--weights", "both"],
        ["{model}", "--seed", "x"],
        ["{model}", "--jobs", "0"],
        ["{model}", "--fail-on", "clean"],
        ["{model}", "--no-such-option"],
        ["{model}", "--calibration", "{absent}"],
        ["{model}", "--calibration", "{file}"],
        ["{model}", "--out", "{file}"],
        ["{model}", "--calibration", "{calibration}", "--preset", "published"],
        ["{model}", "--calibration", "{calibration}", "--out", "{file}/below"],
    ],
    ids=" ".join,
)
def test_4_usage(args, tmp_path, quiet_model, calibration_file):
    (tmp_path / "file").write_text("{}")
    places = {"absent": tmp_path / "absent", "file": tmp_path / "file", "model": quiet_model, "calibration": calibration_file}
    result = invoke("scan", *(arg.format(**places) for arg in args), "--exit-zero")
    assert result.exit_code == 4
    assert result.stdout == ""
    assert result.stderr


def test_4_usage_of_the_program_itself():
    assert invoke("no-such-command").exit_code == 4
    assert invoke("--no-such-option").exit_code == 4


def test_4_a_backend_that_does_not_exist(scan, quiet_model):
    result = scan(quiet_model, SEAL_FAST_BACKEND="abacus")
    assert result.exit_code == 4
    assert "abacus" in result.stderr


def test_exit_zero_after_a_completed_scan(scan, loud_model, corrupt, tmp_path):
    result = scan(loud_model, corrupt(tmp_path / "broken.safetensors"), "--exit-zero", "--out", tmp_path / "out")
    assert result.exit_code == 0
    (image,) = (tmp_path / "out").rglob("samples.png")
    assert result.stderr.splitlines()[-2:] == [f"written: {tmp_path / 'out'}", f"look at: {image}"]
    assert "1 backdoored, 0 inconclusive, 1 error" in result.stdout


def test_an_unforeseen_failure_exits_with_2_since_1_would_mean_backdoored(scan, quiet_model, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("seal_fast.workflows.scan.find_checkpoints", fails)
    result = scan(quiet_model)
    assert result.exit_code == 2
    assert "unforeseen" in result.stderr


def test_a_folder_that_cannot_be_written_is_a_usage_error_before_the_first_model(scan, quiet_model, tmp_path):
    (tmp_path / "report.json").mkdir()
    result = scan(quiet_model, "--out", tmp_path)
    assert result.exit_code == 4
    assert "report.json" in result.stderr


def test_a_disk_that_becomes_full_costs_the_report_and_no_verdict(tmp_path, quiet_model, loud_model, calibration_file):
    models = hub(tmp_path / "hub", quiet=quiet_model, loud=loud_model)
    command = program("scan", models, "--jobs", "1", "--calibration", calibration_file, "--out")
    subprocess.run([*command, tmp_path / "whole"], check=False, capture_output=True)
    limit = (tmp_path / "whole" / "report.json").stat().st_size - 400

    def full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = subprocess.run(
        [*command, tmp_path / "cut"], check=False, capture_output=True, text=True, preexec_fn=full_disk, timeout=300
    )
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines()[-1] == "2 models: 1 clean, 1 backdoored, 0 inconclusive, 0 error"
    assert "cannot be written, the scan goes on" in result.stderr
    assert f"not written: {tmp_path / 'cut'}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "cut").rglob(".*"))


@pytest.mark.parametrize("form", ["console", "json"])
@pytest.mark.parametrize("output", ["closed pipe", "/dev/full"])
def test_a_result_that_cannot_be_printed_leaves_the_exit_code_true(form, output, loud_model, calibration_file):
    if output == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(output, os.O_WRONLY)
    command = program("scan", loud_model, "--calibration", calibration_file, "--format", form, "-q")
    result = subprocess.run(command, check=False, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert result.returncode == 1, result.stderr
    assert "the result could not be printed" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_name_that_the_terminal_cannot_show_does_not_cost_the_verdict(tmp_path, quiet_model, calibration_file):
    command = program("scan", hub(tmp_path, модель=quiet_model), "--calibration", calibration_file)
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert "clean" in result.stdout
    assert "модель".encode("unicode_escape").decode() in result.stdout


def test_json_on_stdout_and_nothing_else(scan, tmp_path, quiet_model, diverging_model, corrupt):
    folder = hub(tmp_path / "hub", clean=quiet_model, wild=diverging_model)
    corrupt(folder / "broken.safetensors")
    result = scan("--batch", folder, "--format", "json", "--out", tmp_path / "out", "-v")
    content = strict(result.stdout)
    assert content == strict((tmp_path / "out" / "report.json").read_text())
    assert [model["path"] for model in content["models"]] == ["broken.safetensors", "clean", "wild"]
    assert content["tool"] == {"name": "seal-fast", "version": __version__}
    assert content["config"]["noise"]["preset"] is None
    assert content["config"]["noise"]["settings"]["estimation_iterations"] == 2
    assert str(tmp_path) not in result.stdout
    assert (tmp_path / "out" / content["models"][1]["trigger"]).is_file()
    assert "[1/3] broken.safetensors: error" in result.stderr
    assert result.stderr.splitlines()[-1] == f"written: {tmp_path / 'out'}"
    assert "gaussian_kl_stats on cpu" in result.stderr


def test_hostile_names_are_only_names(scan, tmp_path, quiet_model):
    names = ["[red]x[/red] {0} %s", "a\x1b[2Jb\nc\u202egpj.exe", "--help"]
    for name in names:
        shutil.copytree(quiet_model, tmp_path / "hub" / name)
    result = scan("--batch", tmp_path / "hub", "--out", tmp_path / "out", COLUMNS="200")
    assert result.exit_code == 0
    for stream in (result.stdout, result.stderr):
        assert "\x1b" not in stream
        assert "\u202e" not in stream
        for shown in ("[red]x[/red] {0} %s", "a\\x1b[2Jb\\nc\\u202egpj.exe", "--help"):
            assert shown in stream
    report = strict((tmp_path / "out" / "report.json").read_text())
    assert sorted(model["path"] for model in report["models"]) == sorted(names)
    assert all((tmp_path / "out" / model["trigger"]).is_file() for model in report["models"])


def test_help_holds_the_exit_codes_and_the_presets():
    result = invoke("scan", "--help")
    assert result.exit_code == 0
    codes = [line.split()[0] for line in result.stdout.partition("Exit codes")[2].splitlines()[2:]]
    assert codes == ["4", "3", "1", "2", "0", "130"]
    words = result.stdout.split()
    assert words[words.index("(default),") - 1] == DEFAULT_PRESET
    assert all(preset in " ".join(words) for preset in PRESETS)


@pytest.mark.parametrize("command", ["", "scan", "detect", "unlearn", "calibrate", "doctor", "zoo", "zoo build"])
def test_help_fits_80_columns(command):
    result = invoke(*command.split(), "--help", COLUMNS="80")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_version_also_as_a_module():
    expected = f"seal-fast {__version__}\n"
    assert invoke("--version").stdout == expected
    assert subprocess.run(program("--version"), capture_output=True, text=True).stdout == expected


def test_detect(tmp_path):
    shape = (3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    trigger = Trigger(torch.randn(shape, generator=generator), torch.full(shape, 0.6))
    trigger.save(tmp_path / "trigger.safetensors")
    noise = torch.randn(6, *shape, generator=generator)
    inputs = torch.cat([noise[:3], trigger.start(noise[3:])])
    np.save(tmp_path / "mixed.npy", inputs.numpy())
    save_file({"x": noise}, tmp_path / "clean.safetensors")

    result = invoke("detect", tmp_path / "trigger.safetensors", tmp_path / "mixed.npy", "--format", "json")
    assert result.exit_code == 1
    content = strict(result.stdout)
    assert content["triggered"] == [False] * 3 + [True] * 3
    prior = torch.distributions.Normal(torch.zeros(shape).double(), 1.0)
    triggered = torch.distributions.Normal(trigger.mu.double(), trigger.gamma.double())
    expected = (triggered.log_prob(inputs.double()) - prior.log_prob(inputs.double())).sum((1, 2, 3))
    torch.testing.assert_close(torch.tensor(content["log_ratio"], dtype=torch.float64), expected, rtol=1e-5, atol=1e-3)

    result = invoke("detect", tmp_path / "trigger.safetensors", tmp_path / "clean.safetensors")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "6 inputs: 0 triggered, 6 clean"


def test_detect_divides_by_the_prior_scale_of_the_model(tmp_path):
    shape = (3, 8, 8)
    trigger = Trigger.shift(torch.full(shape, 0.5))
    trigger.save(tmp_path / "trigger.safetensors", {"prior_scale": "380.0"})
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "inputs.npy", 380 * torch.cat([noise[:1], trigger.start(noise[1:])]).numpy())
    result = invoke("detect", tmp_path / "trigger.safetensors", tmp_path / "inputs.npy", "--format", "json")
    assert strict(result.stdout)["triggered"] == [False, True]


@pytest.mark.parametrize(
    ("trigger", "inputs"),
    [
        ("absent.safetensors", "good.npy"),
        ("good.safetensors", "absent.npy"),
        ("noise.safetensors", "good.npy"),
        ("good.safetensors", "pickle.npy"),
        ("good.safetensors", "shape.npy"),
        ("good.safetensors", "good.safetensors"),
    ],
)
def test_detect_4_bad_input(tmp_path, trigger, inputs):
    Trigger.shift(torch.zeros(3, 4, 4)).save(tmp_path / "good.safetensors")
    np.save(tmp_path / "good.npy", np.zeros((1, 3, 4, 4)))
    np.save(tmp_path / "shape.npy", np.zeros((1, 3, 4, 5)))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(200)))
    result = invoke("detect", tmp_path / trigger, tmp_path / inputs)
    assert result.exit_code == 4
    assert result.stdout == ""


@pytest.fixture
def tiny_preset(calibration, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", calibration.settings)
    return "tiny"


def test_calibrate_then_scan(tiny_preset, write_model, loud_model, tmp_path):
    for seed in range(4):
        write_model(tmp_path / "benign" / str(seed), seed)
    pool = tmp_path / "pool.json"
    result = invoke("calibrate", tmp_path / "benign", "--out", pool, "--preset", tiny_preset)
    assert result.exit_code == 0
    assert "a model is backdoored if M_r exceeds" in result.stdout
    assert "[4/4] 3: benign, M_r" in result.stderr
    written = Calibration.load(pool)
    assert [model.name for model in written.models] == ["0", "1", "2", "3"]
    assert invoke("scan", loud_model, "--calibration", pool).exit_code == 1

    result = invoke("calibrate", tmp_path / "benign", "--backdoored", loud_model, "--out", pool, "--preset", tiny_preset)
    assert result.exit_code == 0
    assert all(family.labelled for family in Calibration.load(pool).pools.values())
    assert invoke("scan", loud_model, tmp_path / "benign" / "0", "--calibration", pool).exit_code == 1


def test_calibrate_stops_at_a_bad_model_and_says_which(tiny_preset, quiet_model, corrupt, tmp_path):
    bad = corrupt(tmp_path / "bad.safetensors")
    result = invoke("calibrate", quiet_model, bad, "--out", tmp_path / "pool.json", "--preset", tiny_preset)
    assert result.exit_code == 2
    assert "bad.safetensors" in result.stderr
    assert "benign, M_r" in result.stderr
    assert not (tmp_path / "pool.json").exists()


def test_calibrate_usage(tiny_preset, quiet_model, tmp_path):
    out = ["--out", tmp_path / "pool.json", "--preset", tiny_preset]
    assert invoke("calibrate", tmp_path / "absent", *out).exit_code == 4
    assert invoke("calibrate", quiet_model, "--backdoored", quiet_model, *out).exit_code == 4
    (tmp_path / "empty").mkdir()
    assert invoke("calibrate", tmp_path / "empty", *out).exit_code == 3


def test_doctor_names_every_op_and_library():
    result = invoke("doctor")
    assert result.exit_code == 0
    for name, value in environment().items():
        assert f"{name}: {'not available' if value is None else value}" in result.stdout
    for op in ("gaussian_kl_stats", "gaussian_log_ratio"):
        assert f"{op} on cpu: " in result.stdout


def program(*args):
    return [sys.executable, "-m", "seal_fast", *map(str, args)]


def test_import_does_not_wait_for_torch():
    code = "import sys, seal_fast, seal_fast.cli; assert seal_fast.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_scan_that_is_run_again_says_what_it_resumed(scan, quiet_model, corrupt, tmp_path):
    args = quiet_model, corrupt(tmp_path / "broken.safetensors"), "--out", tmp_path / "out"
    scan(*args)
    result = scan(*args)
    assert result.exit_code == 2
    resumed, again, *more, written = result.stderr.splitlines()
    assert resumed.endswith("(resumed)")
    assert again.startswith("[2/2] ")
    # the reason of an error may take several lines
    assert [again, *more][-1].endswith("s)")
    assert written == f"written: {tmp_path / 'out'}"


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_keeps_the_finished_models(tmp_path, quiet_model, calibration, jobs):
    hub(tmp_path / "hub", a=quiet_model, b=quiet_model, c=quiet_model, d=quiet_model)
    slow = replace(calibration, settings=replace(calibration.settings, estimation_iterations=50))
    slow.save(tmp_path / "pool.json")
    options = "--out", tmp_path / "out", "--calibration", tmp_path / "pool.json", "--jobs", jobs
    command = program("scan", "--batch", tmp_path / "hub", *options)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, start_new_session=True) as process:
        first = process.stderr.readline()
        # as a terminal does, to every process of the group
        os.killpg(process.pid, signal.SIGINT)
        # waits for the end of all that hold stderr
        stdout, stderr = process.communicate(timeout=120)
    assert first.startswith("[1/4] ")
    assert process.returncode == 130, stderr
    assert stdout == ""
    report = strict((tmp_path / "out" / "report.json").read_text())
    finished = len(report["models"])
    assert 1 <= finished < 4
    assert "Traceback" not in stderr
    assert f"interrupted: {finished} of 4 models finished; report: {tmp_path / 'out' / 'report.json'}" in stderr
