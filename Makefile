# Each target sets itself up: nothing is needed but make and Python 3.11 or newer.
#   make demo                  optimize the real MiniLM, export it, load it without torch
#   make test                  linters, types, all tests
#   make conformance           the ONNX backend test suite, plain and optimized
#   make bench-architectures   the table of the README
#   make bench-optimize        what an optimization itself costs, in time and memory
#   make bench-fusion          whole models, causal attention and the optimizer's cost against every peer
#   make bench-kernels         generated kernels by themselves, against ONNX Runtime's and torch's
#   make bench-precision       low precision against OpenVINO's bf16: speed, error and memory
#   make bench-decode          tokens a second of causal language models, and the forms and formats of their cache
#   make bench-layers          decoding against every peer, and the gain of leaving layers out against what was asked
#   make bench-tokens          merging tokens in vision transformers, against the same models without
#   make bench-relational      relational graph networks against PyG, torch.compile and torch by hand
#   make bench-sparse          block-sparse attention against dense, by itself and in whole models
#   make bench-tvm             whole models on target tvm-cpu against plain ONNX Runtime
#   make bench-cuda-memory     decoding under a memory budget against accelerate's offloading, on a GPU
#   make bench-cuda-buckets    requests of random sizes on target ort-cuda, padded to few, on a GPU
#   make bench-cuda-decode     decoding on target ort-cuda against transformers, on a GPU
#   make bench-cuda            whole models on target ort-cuda against torch and ONNX Runtime, on a GPU
#   make bench-cuda-merge      token merging through target ort-cuda against the exact program, on a GPU
#   make bench-cuda-relational relational layers on a GPU, against torch by hand and PyG's modules
#   make bench-tvm-cuda        programs on target tvm-cuda against torch, on a GPU
#   make bench-gpu             every benchmark of target ort-cuda and the kernels, and which promises hold
#   make sanitize-cuda         a part of the kernels' tests under compute-sanitizer's memcheck, on a GPU
#   make bench-startup         loading an artifact, against an ONNX Runtime session alone
# PYTHON=... chooses an interpreter, VENV=... another place for the environment.

VENV ?= .venv
PYTHON ?=
JOBS ?= 2
PYTEST_ARGS ?=
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint conformance bench-architectures bench-optimize bench-fusion bench-kernels bench-decode \
  bench-layers bench-sparse bench-tokens bench-relational bench-tvm bench-startup bench-precision \
  bench-cuda bench-gpu bench-cuda-buckets bench-cuda-decode bench-cuda-memory bench-cuda-merge bench-cuda-relational bench-tvm-cuda sanitize-cuda clean

demo: $(STAMP)
	@$(BIN)/python examples/demo_minilm.py

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

conformance: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/conformance/run.py --jobs $(JOBS)

bench-architectures: $(STAMP)
	@$(BIN)/python benchmarks/architectures.py

bench-optimize: $(STAMP)
	@$(BIN)/python benchmarks/optimize_cost.py

# Without OpenVINO the benchmark runs, and says that it is not installed.
bench-fusion: $(STAMP)
	@$(BIN)/python -c 'import openvino' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]' || true
	@$(BIN)/python benchmarks/fusion.py

bench-kernels: $(STAMP)
	@$(BIN)/python benchmarks/kernels_gemm.py
	@$(BIN)/python benchmarks/kernels_attention.py
	@$(BIN)/python benchmarks/kernels_graph.py
	@$(BIN)/python benchmarks/kernels_overhead.py

bench-decode: $(STAMP)
	@$(BIN)/python benchmarks/decode.py
	@$(BIN)/python benchmarks/cache_formats.py
	@$(BIN)/python benchmarks/kv_cache.py

bench-layers: $(STAMP)
	@$(BIN)/python benchmarks/layers.py

# TVM is an extra.
bench-tokens: $(STAMP)
	@$(BIN)/python -c 'import tvm' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tvm]'
	@$(BIN)/python benchmarks/token_merging.py

bench-relational: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/relational.py

bench-sparse: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sparse_attention.py

bench-tvm: $(STAMP)
	@$(BIN)/python -c 'import tvm' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tvm]'
	@$(BIN)/python benchmarks/tvm_target.py

# Without OpenVINO the benchmark runs, and says that it is not installed; without TVM there is nothing to measure.
bench-precision: $(STAMP)
	@$(BIN)/python -c 'import openvino, tvm' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,tvm]' || true
	@$(BIN)/python benchmarks/precision.py

# PYTHON is one with torch for CUDA, transformers, and onnxruntime-gpu in the place of onnxruntime.
bench-cuda-memory:
	@PYTHONPATH=. $(or $(PYTHON),python3) benchmarks/cuda_memory.py

bench-cuda-decode:
	@PYTHONPATH=. $(or $(PYTHON),python3) benchmarks/cuda_decode.py --json benchmarks/cuda_decode.json

bench-cuda-buckets:
	@PYTHONPATH=. $(or $(PYTHON),python3) benchmarks/cuda_buckets.py --json benchmarks/cuda_buckets.json

bench-cuda-merge:
	@PYTHONPATH=. $(or $(PYTHON),python3) benchmarks/cuda_merge_pipeline.py --json benchmarks/cuda_merge_pipeline.json

bench-cuda:
	@PYTHONPATH=. $(or $(PYTHON),python3) benchmarks/ort_cuda.py --json benchmarks/ort_cuda.json

# PYTHON is one with torch for CUDA and torch_geometric; nvcc is needed.
bench-cuda-relational:
	@PYTHONPATH=. $(or $(PYTHON),python3) benchmarks/cuda_relational.py --json benchmarks/cuda_relational.json

# PYTHON is one with torch for CUDA and apache-tvm; FOLDER is where the programs are put.
bench-tvm-cuda:
	@PYTHONPATH=. $(or $(PYTHON),python3) benchmarks/tvm_cuda.py make $(or $(FOLDER),/tmp/planish-tvm-cuda)
	@PYTHONPATH=. $(or $(PYTHON),python3) benchmarks/tvm_cuda.py run $(or $(FOLDER),/tmp/planish-tvm-cuda)

# As bench-cuda; ten minutes. The results that are kept in benchmarks/results are read without --run.
bench-gpu:
	@PYTHONPATH=. $(or $(PYTHON),python3) benchmarks/cuda_summary.py --run

# Without torch's cache each tensor is an allocation of its own, so that what reads beyond one is seen; nor can torch
# capture a graph then, which test_graph does.
sanitize-cuda:
	@PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=. compute-sanitizer --tool memcheck --error-exitcode 9 \
	  $(or $(PYTHON),python3) -m pytest tests/runtime/cuda -k "not test_graph" -p tests.every --every $(or $(EVERY),7) \
	  --noconftest -c /dev/null --rootdir . --import-mode=importlib -p no:cacheprovider

bench-startup: $(STAMP)
	@$(BIN)/python benchmarks/startup.py

# The environment is made again only when the requirements change. pip compiles all modules on one core, a minute; here
# every core does, and the models of transformers wait until one is used.
unexport PYTHONDONTWRITEBYTECODE
$(STAMP): pyproject.toml constraints.txt
	@python=$$(for p in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done); \
	if [ -z "$$python" ]; then echo "planish needs Python 3.11 or newer; none was found (PYTHON=... names one)." >&2; exit 1; fi; \
	if ! $$python -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "$$python has no venv module; on Debian and Ubuntu: apt install python3-venv." >&2; exit 1; fi; \
	echo "Setting up $(VENV) with $$($$python --version) (once; about 2 GB)"; \
	[ -x $(BIN)/python ] || $$python -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m compileall -q -j 0 -x '/transformers/models/|/tests?/' $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info artifact
