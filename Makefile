# `make demo` and `make test` do all the set-up: they need Python 3.11, gcc and make, and the network for the first run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SCANS := benchmarks/bench_time_to_verdict.py benchmarks/bench_many_models.py
REVERSION := $(foreach name,winograd_convolution reversion input_detection,benchmarks/bench_$(name).py)
OTHER_FAMILIES := $(foreach family,v edm ve,hard-16-$(family) hard-16-$(family)-benign-b hard-16-$(family)-benign-c)
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt

.PHONY: setup demo test lint bench bench-float32 accuracy calibration zoo clean

setup: $(VENV)/.ready

# torch is installed first and alone, or packages that depend on it would choose a build of their own
$(VENV)/.ready: $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The three small models share the two cores of the first scan with the pipeline, so that they take no time of their own. Images of
# zoo-text/ need no more guidance than 3 and no more than 10 steps (seal_fast/zoo/evaluate_text.py). A second run resumes the scans.
demo: setup
	rm -rf demo-results/unlearned
	@printf '\n1. Which models are backdoored? The scan is told nothing of their triggers.\n'
	$(BIN)/seal-fast scan zoo-text/text-64-pixel zoo/benign-16-e zoo/bad-16-stop zoo/troj-16-blend \
		--guidance 3 --out demo-results/scan --exit-zero
	@printf '\n2. Unlearn what the scan found in the text-to-image pipeline.\n'
	$(BIN)/seal-fast unlearn zoo-text/text-64-pixel --found demo-results/scan/zoo-text/text-64-pixel --learning-rate 1e-3 \
		--train-batch-size 8 --steps 100 --preservation 2 --guidance 3 --sampler-steps 10 --samples 40 --out demo-results/unlearned
	@printf '\n3. Is anything left? Scan the unlearned pipeline in the same way.\n'
	$(BIN)/seal-fast scan demo-results/unlearned --guidance 3 --out demo-results/scan-after
	@printf '\nThe whole story in one image: demo-results/unlearned/before_after_1.png\n'
	@echo "What the trigger does:         demo-results/scan/zoo-text/text-64-pixel/trigger_1.png"
	@echo "Where the model attends to it: demo-results/unlearned/attention_1.png"
	@echo "A recovered noise trigger:     demo-results/scan/zoo/bad-16-stop/samples.png"

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --cov --cov-fail-under=90

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pre-commit run --all-files no-pickle
	$(BIN)/pre-commit run --all-files vocabulary

bench: setup
	$(BIN)/python -m pytest benchmarks --ignore=benchmarks/bench_cross_attention.py $(SCANS:%=--ignore=%) \
		--benchmark-json=benchmarks/results/speed.json
	$(BIN)/python -m pytest $(SCANS) --benchmark-json=benchmarks/results/scans.json
	$(BIN)/python -m pytest benchmarks/bench_cross_attention.py --benchmark-json=benchmarks/results/cross_attention.json
	$(BIN)/python -m benchmarks.render_results

# the benchmarks that differ on a processor that does not multiply bfloat16
bench-float32: setup
	$(BIN)/python -m pytest $(REVERSION) $(SCANS) --benchmark-json=benchmarks/results/scans_float32.json
	$(BIN)/python -m benchmarks.render_results

accuracy: setup
	$(BIN)/python -m benchmarks.accuracy_table
	$(BIN)/python -m benchmarks.render_results

# the calibration that seal-fast ships, from the zoo's models of role "calibration"; those that zoo/ does not hold are built first
calibration: setup
	$(BIN)/seal-fast zoo build zoo $(OTHER_FAMILIES:%=--only %)
	$(BIN)/seal-fast calibrate zoo/benign-16-[a-d] zoo/benign-32-a zoo/benign-32-b $(OTHER_FAMILIES:%=zoo/%) \
		--out seal_fast/noise_triggers/data/search.json

zoo: setup
	$(BIN)/seal-fast zoo build zoo
	$(BIN)/seal-fast zoo build-text zoo-text

clean:
	rm -rf $(VENV) build demo-results
