# make demo: install, prepare the embedded corpus, train, sample, fine-tune, ask. make test: install, lint, test.
# make lessons: run the course and redraw its pictures.
# make install: create the virtual environment .venv. make clean: delete it and the caches, but no corpus and no run.
# make chaos: kill training, damage its files, fill its disk, and count what is lost, in about 5 minutes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo install test lessons chaos gpu lint format clean

demo: .venv/installed
	@echo "1. A corpus: Python's own documentation, and a vocabulary of 1,024 tokens learned from it"
	@$(BIN)/python data/pydocs/prepare.py
	@echo; echo "2. A language model, trained from scratch (config/pydocs.py)"
	@$(BIN)/python train.py config/pydocs.py
	@echo; echo "3. Three texts by the model"; echo
	@$(BIN)/python sample.py --out_dir=out/pydocs --prompt="The " --num_samples=3 --max_new_tokens=300 --temperature=0.6
	@echo; echo "4. The model learns to answer questions (config/sft_pydocs.py)"
	@$(BIN)/python data/pydocs_sft/prepare.py
	@$(BIN)/python finetune.py config/sft_pydocs.py
	@echo; echo "5. Three answers by the fine-tuned model"; echo
	@for question in "What does textwrap.fill do?" "Which module has wraps?" "Which arguments does json.dumps take?"; do \
		echo "> $$question"; $(BIN)/python sample.py --out_dir=out/sft_pydocs --prompt="$$question" --temperature=0; done

install: .venv/installed

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist=loadfile

chaos: .venv/installed
	$(BIN)/python bench/chaos.py

# The course: every lesson runs, and draws its picture into lessons/pictures/.
lessons: .venv/installed
	@$(BIN)/python -c "import matplotlib" 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check matplotlib
	@for lesson in lessons/[0-9]*.py; do echo; echo "== $$lesson"; $(BIN)/python $$lesson || exit 1; done

# What needs a GPU: its tests and its figures, into RESULTS.md. With the Python of .venv if there is one, else with PYTHON.
gpu:
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) bench/gpu.py $(if $(NANOGPT),--nanogpt="$(NANOGPT)") \
		$(if $(INPUT),--input="$(INPUT)") $(if $(MINUTES),--minutes=$(MINUTES)) $(if $(PARTS),--parts=$(PARTS))

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "plainGPT needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ .venv/installed

clean:
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
