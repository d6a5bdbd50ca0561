# Every target sets up what it needs. `make demo` and `make test` are the two to know.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# cuda where there is an NVIDIA driver, else cpu.
ACCELERATOR ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
# On a CPU-only host whose package index offers only CUDA builds of torch, name PyTorch's CPU index here.
TORCH_INDEX ?=
# uv, fetched where it is not on PATH, or `pip`.
INSTALLER ?= auto
SOAK_MINUTES ?= 20
# Of the soak: fake or vllm.
ENGINE ?= fake
GPU_MINUTES ?= 9
SBOM_PYTHON ?= $(BIN)/python

# A file stays in one process, so that its engines and servers start once; what takes longest begins first
# (tests/conftest.py). Three: two cores are busy while a test of the third waits for what must come.
# On a GPU one process: engines of two would not find room.
TEST_PROCESSES ?= $(if $(filter cuda,$(ACCELERATOR)),1,3)
# A hundred processes start in there: each would compile what it imports where this is set.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: families demo demo-language test test-clients test-language check faults gpu-check try fuzz soak lint format proto docs breaking released playground dist test-dist sbom setup clean test-observability test-images test-hosts image-requirements

demo: setup  ## distil the playground's student, from nothing to a plot
	$(BIN)/python -m examples.demo

demo-language: $(VENV)/.language  ## distil a pruned SmolLM2-135M-Instruct: a real model, in half an hour
	$(BIN)/python -m examples.language

test-language: $(VENV)/.language  ## the same in three steps, on fewer prompts: does it move the right way
	$(BIN)/python -m pytest -q tests/language/try_language.py

test: setup  ## the whole test suite, in three processes
	$(PYTEST)

test-clients: setup  ## TRL's own client from its wheel, in an environment of its own, against a teacher
	$(BIN)/python -m pytest -q tests/clients/try_trl.py

test-observability: setup  ## a real Prometheus (Debian's package) on teachers and trainers under load, every query of every panel; ten minutes
	OBSERVABILITY_PICTURES=docs $(BIN)/python -m pytest -q tests/observability/try_observability.py

check: lint  ## lint, types and the tests that need no engine, in about a minute
	$(PYTEST) -m "not vllm and not e2e"

faults: setup  ## the long rounds of tests/rounds.py: 1,000 killed processes, 100,000 broken messages
	FAULT_ROUNDS=long $(BIN)/python -m pytest -q tests/faults tests/benchmarks \
	    tests/trainer/test_failures.py tests/e2e/test_demo.py tests/distributions/test_setup_venv.py

gpu-check: setup  ## all that only a GPU can show, in GPU_MINUTES; on a CPU the same, small: docs/gpu.md
	$(BIN)/python -m benchmarks.gpu --minutes $(GPU_MINUTES) --json runs/bench-gpu.json

try: setup  ## README's two commands as printed, with small random models and eight rows
	$(BIN)/python -m pytest -q tests/e2e/try_readme_commands.py

fuzz: setup  ## 100,000 broken messages (FUZZ_CASES, FUZZ_SEED)
	FAULT_ROUNDS=long $(BIN)/python -m pytest -q tests/faults/test_fuzz.py \
	    tests/faults/test_fuzz_order.py

soak: setup  ## mixed clients for SOAK_MINUTES on ENGINE (fake, vllm), with a table in docs/
	$(BIN)/python -m tests.faults.soak --minutes $(SOAK_MINUTES) --engine $(ENGINE)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf format -d --exit-code \
	    && ../$(BIN)/buf breaking --against released.binpb
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cd proto && ../$(BIN)/buf format -w

proto: setup  ## regenerate the code of the contract
	$(BIN)/python -m grpc_tools.protoc -I teacher_wire/pb=proto/opd/teacher/v1 \
	    --python_out=proto --pyi_out=proto --grpc_python_out=proto teacher_wire/pb/teacher.proto

breaking: setup  ## the contract keeps what clients of the last release rely on
	cd proto && ../$(BIN)/buf breaking --against released.binpb

released: setup  ## the contract as it is becomes the one to keep; when a release has been made
	cd proto && ../$(BIN)/buf build --exclude-source-info -o released.binpb

docs: setup  ## docs/settings.md from the docstrings of the settings, the columns in docs/run-folder.md, Grafana's dashboards
	$(BIN)/python -m scripts.settings_document
	$(BIN)/python -m scripts.columns_document
	$(BIN)/python -m scripts.dashboards

families: setup  ## the table of families in docs/training.md, a quarter of an hour; goes on where it was cut off
	$(BIN)/python -m benchmarks.families

playground: setup  ## train the playground's teacher and student anew
	$(BIN)/python -m examples.playground.build --out examples/playground/checkpoints

dist: setup  ## driftline and driftline-client, each as source and wheel, in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist proto
	$(BIN)/python -m build --outdir dist .

test-dist: dist  ## outside the checkout: each wheel in an environment of its own, both in one, wheels from the sources
	$(BIN)/python -m tests.distributions.environments dist

sbom: setup  ## the product as installed beside SBOM_PYTHON, this environment's or another's, as CycloneDX JSON in dist/
	mkdir -p dist
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --spec-version 1.6 \
	    --output-format JSON --output-file dist/environment.cdx.json $(SBOM_PYTHON)
	$(BIN)/python -m scripts.bill_of_materials $(SBOM_PYTHON) < dist/environment.cdx.json \
	    > dist/driftline.cdx.json
	rm dist/environment.cdx.json

test-images: setup  ## the CPU images built, measured, started with podman and by docker compose; as root
	$(BIN)/python -m pytest -q -s tests/docker/try_images.py

test-hosts: setup  ## a teacher and two trainers in network namespaces, a cut of 10 s; as root
	$(BIN)/python -m pytest -q -s tests/hosts/try_hosts.py

image-requirements: setup  ## docker/requirements-*.txt: the versions in the images, resolved anew
	$(BIN)/python -m scripts.image_requirements

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml proto/pyproject.toml scripts/setup_venv.py
	$(PYTHON) scripts/setup_venv.py --venv $(VENV) --accelerator $(ACCELERATOR) \
	    --torch-index "$(TORCH_INDEX)" --installer $(INSTALLER)
	touch $@

$(VENV)/.language: $(VENV)/.ready
	$(BIN)/python -m pip --disable-pip-version-check install --quiet -e ".[language]"
	touch $@

clean:
	rm -rf $(VENV) build dist proto/build *.egg-info proto/*.egg-info runs
