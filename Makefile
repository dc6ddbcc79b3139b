# make demo   creates .venv, installs, and trains the model that comes with tiller for a few minutes
# make test   the same set-up, then lint, types and tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CHROMIUM := /usr/bin/chromedriver
FONT := /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test setup font chromium clean

demo: setup
	$(BIN)/tiller demo

test: setup font chromium
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The scenes of the embedded world are drawn from this font; training and sampling do without it.
font:
	@test -e $(FONT) || (command -v apt-get >/dev/null && (apt-get update -qq; apt-get install -y -qq fonts-noto-color-emoji)) \
	  || echo "fonts-noto-color-emoji is not installed: tests that draw scenes are skipped"

# The vote page is tried in this browser, which Debian packages; without it these tests are skipped.
chromium:
	@test -e $(CHROMIUM) || (command -v apt-get >/dev/null && (apt-get update -qq; \
	  apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-liberation)) \
	  || echo "chromium and chromium-driver are not installed: tests of the vote page in a browser are skipped"

clean:
	rm -rf $(VENV) runs
