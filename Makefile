# Everything runs in .venv, which the first target that needs it creates with this interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-gpu lint docs bench

demo: .venv/.installed
	$(BIN)/undivided demo

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n auto --cov --cov-report=term

test-gpu: .venv/.installed-dev
	$(BIN)/python -m pytest --require-cuda -m "gpu or on_device"

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.installed
	$(BIN)/undivided systems --write README.md
	$(BIN)/undivided doctor --markdown > docs/support.md

bench: .venv/.installed
	$(BIN)/undivided reproduce --all

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The stamps make a second run cost nothing; a change of pyproject.toml installs again.
.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/.installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch .venv/.installed $@
