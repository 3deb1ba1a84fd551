# What a contributor runs, and what CI runs: .ci/run calls these. They use .venv; BIN=/path/to/bin takes another place.
BIN ?= .venv/bin
FUZZ_SECONDS ?= 60
CPP = $(shell find csrc -name "*.cpp" -o -name "*.h")

.PHONY: install style format types layers test bench docs wheel sanitize fuzz licences audit ci

install: ## the environment: the package, the tests' packages, the tools of this file
	test -x $(BIN)/python || python3 -m venv .venv
	$(BIN)/pip install -q -e ".[test,dev,docs]"

style: ## ruff and clang-format, as .pre-commit-config.yaml runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: ## what `style` would complain of and a tool can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

types: ## mypy, strict in ops, objectives and training
	$(BIN)/mypy

layers: ## a room imports only rooms below it, and there are no circles
	PYTHONPATH=. $(BIN)/lint-imports

test: ## make test ARGS=tests/losses, or ARGS="tests/losses -k soft_lambda"
	$(BIN)/python -m pytest -n auto $(ARGS)

bench: ## beside peers, one file: make bench ARGS=bench/bench_step.py (needs the extra `bench`)
	$(BIN)/python -m pytest -s $(or $(ARGS),bench)

docs: ## the site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: ## sdist and wheel in dist/; what they hold; the demo from the wheel, without a compiler
	$(BIN)/python scripts/check_packages.py

sanitize: ## csrc under AddressSanitizer and UndefinedBehaviorSanitizer, and fuzzed: make sanitize FUZZ_SECONDS=600
	PATH="$(abspath $(BIN)):$$PATH" csrc/sanitize.sh $(FUZZ_SECONDS)

fuzz: ## hostile files and answers of servers, for a time: make fuzz FUZZ_SECONDS=600 ARGS="--seed 1 --keep_going"
	PYTHONPATH=.:tests/support HF_HUB_OFFLINE=1 $(BIN)/python tests/fuzz/fuzz_inputs.py --seconds $(FUZZ_SECONDS) $(ARGS)

licences: ## of everything that is needed to run; an error for one that is not allowed
	$(BIN)/python scripts/licences.py

audit: ## known vulnerabilities of what is installed; needs the network
	$(BIN)/pip install -q pip-audit
	$(BIN)/pip-audit --skip-editable

ci: ## all of it, in a fresh environment
	.ci/run
