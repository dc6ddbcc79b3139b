"""A run folder as one HTML file that needs nothing else: no network, no fonts, no scripts but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from tiller import emoji
from tiller.report import sections
from tiller.report.diagnosis import diagnose
from tiller.report.gallery import Gallery, gallery
from tiller.report.markup import Child, join, raw, tag
from tiller.report.record import Record, read
from tiller.report.words import summarise
from tiller.types import RunError

REPORT = "report.html"


def write(folder: Path) -> Path:
    """Write RUN/report.html as a whole or not at all; returns its path.

    Raises:
        RunError: the folder holds no run, or cannot be written.
    """
    return put(folder / REPORT, render(folder))


def put(path: Path, text: str) -> Path:
    """Write a page as a whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path}: {error.strerror}; make room, or give a folder that can be written."
        ) from error
    return path


def render(folder: Path, live: int = 0) -> str:
    """The page of a run folder, finished or not; `live` is the number of seconds between two looks, 0 for a file.

    Raises:
        RunError: the folder holds no run.
    """
    return run_page(read(folder), gallery(folder), folder, live)


def run_page(record: Record, shown: Gallery, folder: Path, live: int = 0) -> str:
    """The page of one run."""
    gaps = [*record.gaps, *shown.gaps]
    parts = [
        sections.header(record, bool(live)),
        sections.diagnosis(record, diagnose(record)),
        sections.pictures(record, shown),
        sections.curves(record),
        sections.generalisation(record),
        sections.over_optimisation(record),
        sections.cost(record),
        sections.loading(snippet(record, folder, shown)) if (folder / "model").is_dir() else None,
        sections.details(record, gaps),
    ]
    return page(f"{record.name}: {summarise(record).headline}", parts, live)


def page(title: str, parts: Sequence[Child], live: int = 0, first: str = "diagnosis", class_: str | None = None) -> str:
    """A whole document. Its policy lets in the style and the script that it carries, and pictures in data URIs."""
    style, script = _own("page.css"), _own("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        f"form-action 'none'" + ("; connect-src 'self'" if live else "")
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("noscript", tag("meta", http_equiv="refresh", content=live)) if live else None,
        tag("title", title),
        tag("style", raw(style)),
    )
    past = tag("a", f"Skip to the {first}", href=f"#{first}", class_="skip")
    foot = tag("footer", "Made by tiller out of the files in run folders. Nothing on this page comes from elsewhere.")
    body = tag("body", past, tag("main", *parts), foot, tag("script", raw(script)), class_=class_)
    root = tag("html", head, body, lang="en", data_live=live or None)
    return "<!doctype html>\n" + join([root]) + "\n"


@cache
def _own(name: str) -> str:
    return resources.files("tiller.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def snippet(record: Record, folder: Path, shown: Gallery) -> str:
    """Plain diffusers code that loads what was trained and draws a picture with it."""
    call = {**_settings(record, "sampling"), **_settings(record, "evaluation.sampling")}
    arguments = "".join(f", {name}={_python(value)}" for name, value in call.items() if str(name).isidentifier())
    prompt = shown.shots[0].prompt if shown else "a cat"
    lines = ["from diffusers import DiffusionPipeline"]
    if record.setting("model.lora_rank", 16) is None:
        load = f"pipe = DiffusionPipeline.from_pretrained({_python(str(folder / 'model'))})"
    else:
        base = _python(record.model)
        if record.model in emoji.MODELS:
            lines.append("from tiller import emoji")
            base = f"emoji.path({base})"
        revision = record.setting("model.revision")
        pinned = f", revision={_python(revision)}" if revision else ""
        load = (
            f"pipe = DiffusionPipeline.from_pretrained({base}{pinned})\n"
            f"pipe.load_lora_weights({_python(str(folder / 'model'))})"
        )
    draw = f'pipe({_python(prompt)}{arguments}).images[0].save("picture.png")'
    return "\n".join([*lines, "", load, draw])


def _settings(record: Record, key: str) -> dict[str, Any]:
    found = record.setting(key)
    return dict(found) if isinstance(found, dict) else {}


def _python(value: Any) -> str:
    """A value as Python writes it, with double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
