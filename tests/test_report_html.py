"""The report: what a reader finds on the page, and that nothing on it can act on its own."""

import base64
import hashlib
import io
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny
from report_folder import EPOCHS, EVIL, PROMPTS, colour, gain, run_folder
from tiller.cli import main
from tiller.report import html, record, sheet, words
from tiller.report.chart import Line, chart, interval, thinned, ticks
from tiller.report.gallery import BUDGET, gallery
from tiller.report.markup import join, raw, tag
from tiller.report.pictures import keep_stage
from tiller.run import claim


class Page(HTMLParser):
    """Elements with their attributes and their own text."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((name, dict(attributes), []))
        if name not in ("img", "input", "meta", "br"):
            self.open.append(self.found[-1][2])

    def handle_endtag(self, name: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for texts in self.open:
            texts.append(data)

    def all(self, name: str, **wanted: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, "".join(texts))
            for found, attributes, texts in self.found
            if found == name and all(attributes.get(key.rstrip("_")) == value for key, value in wanted.items())
        ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "run")


def picture(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def test_the_summary_says_what_was_asked_won_and_lost_and_whether_to_believe_it(run: Path) -> None:
    page = Page(html.render(run))
    ((_, headline),) = page.all("p", class_="headline")
    assert headline.replace("\u00a0", " ") == (
        "The reward rose by +0.340 kB (95 % +0.280 to +0.400) on animals never trained on. emoji_gold stayed."
    )
    answers = [text for _, text in page.all("dd")][:4]
    assert answers == [
        "some/model towards jpeg_compressibility on the prompts animals, by ddpo: 4 of 4 epochs, 32 pictures drawn and "
        "scored.",
        "+0.350 kB (95 % +0.300 to +0.400) on trained prompts; +0.340 kB (95 % +0.280 to +0.400) on unseen animals.",
        "Nothing beyond chance by emoji_gold; pictures of one prompt are 25% more alike.",
        "Yes: beyond chance on prompts never trained on, and no other reward fell beyond chance.",
    ]
    assert [text for _, text in page.all("dd")][4:10] == ["+0.340 kB", "75%", "75%", "800 nats", "32", "6.0 min"]


@pytest.mark.parametrize(
    ("gains", "verdict", "begins"),
    [
        ([], "open", "Open: there is no comparison"),
        ([gain("trained", "r", -0.1, 0.1, 0.3)], "no", "No: every interval holds 0."),
        ([gain("trained", "r", -0.3, -0.2, -0.1)], "no", "No: the reward fell beyond chance on trained prompts."),
        (
            [gain("unseen_animals", "r", -0.1, 0.2, 0.3), gain("unseen_objects", "r", 0.1, 0.2, 0.3)],
            "partly",
            "In part: beyond chance on some prompts never trained on, but not on unseen animals.",
        ),
        ([gain("trained", "r", 0.1, 0.2, 0.3)], "partly", "For the trained prompts: no others were measured."),
        (
            [gain("trained", "r", 0.1, 0.2, 0.3), gain("unseen_objects", "r", -0.1, 0.2, 0.3)],
            "partly",
            "For the trained prompts only",
        ),
        ([gain("unseen_objects", "r", 0.1, 0.2, 0.3)], "partly", "The gain, yes; what it cost, nobody measured."),
        (
            [gain("unseen_objects", "r", 0.1, 0.2, 0.3), gain("trained", "gold", -0.3, -0.2, -0.1)],
            "partly",
            "In part: the gain is beyond chance, but gold fell beyond chance too",
        ),
        ([gain("unseen_objects", "r", 0.1, 0.2, 0.3), gain("trained", "gold", -0.3, -0.2, 0.1)], "yes", "Yes"),
    ],
)
def test_the_verdict_follows_the_intervals(gains, verdict, begins) -> None:
    lines = [record.Gain(**one) for one in gains]
    said = words.summarise(record.Record(config={"reward": "r"}, gains=lines))
    assert said.verdict == verdict
    assert said.believe.startswith(begins)


def test_where_pairs_were_trained_on_the_first_reported_reward_is_the_one_that_is_told() -> None:
    pairs = record.Record(
        config={"reward": None, "data": "pairs.jsonl"}, gains=[record.Gain(**gain("t", "gold", 0.1, 0.2, 0.3))]
    )
    said = words.summarise(pairs)
    assert said.headline == "The reward rose by +0.200 (95 % +0.100 to +0.300) on t."
    assert "towards the data in pairs.jsonl" in said.asked


def test_a_headline_does_not_hide_the_prompts_on_which_nothing_was_won() -> None:
    lines = [gain("unseen_animals", "r", -0.1, 0.2, 0.3), gain("unseen_objects", "r", 0.1, 0.2, 0.3)]
    said = words.summarise(record.Record(config={"reward": "r"}, gains=[record.Gain(**one) for one in lines]))
    assert said.headline == (
        "The reward rose by +0.200 (95 % +0.100 to +0.300) on objects never trained on, but not beyond chance on "
        "unseen animals."
    )


def test_the_page_needs_nothing_else_and_runs_only_its_own_script(run: Path) -> None:
    text = html.render(run)
    page = Page(text)
    for name, attributes, _ in page.found:
        for key, value in attributes.items():
            assert not key.startswith("on"), (name, key)
            assert key != "style"
            if key in ("src", "href", "action", "srcset", "data"):
                assert str(value).startswith(("data:image/webp;base64,", "#")), (name, key, str(value)[:80])
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    ((script,), (style,)) = (re.findall(rf"<{name}>(.*?)</{name}>", text, re.S) for name in ("script", "style"))
    (policy,) = [a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    for part, content in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{part} 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'")
    assert "connect-src" not in str(policy)


def test_what_the_folder_holds_cannot_break_out_of_its_place(run: Path) -> None:
    """A prompt, a reward's name, a metric's name, a setting and a split, all of them HTML."""
    config = (run / "config.yaml").read_text().replace("animals", json.dumps(EVIL)).replace("some/model", EVIL[:30])
    (run / "config.yaml").write_text(config.replace("jpeg_compressibility", json.dumps(EVIL)))
    lines = [json.loads(line) | {EVIL: 1.0, f"eval/{EVIL}/{EVIL}": 2.0} for line in (run / "metrics.jsonl").open()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "evaluation" / "comparison.json").write_text(json.dumps([gain(EVIL, EVIL, 0.1, 0.2, 0.3)]))
    (run / "evaluation" / "monitor.json").write_text(json.dumps({"findings": [{"epoch": EVIL, "text": EVIL}]}))
    (run / "environment.json").write_text(json.dumps({EVIL: EVIL, "packages": EVIL}))
    text = html.render(run)
    assert text.count("<script") == 1
    assert "<img src=x" not in text
    page = Page(text)
    assert {a["src"].partition(",")[0] for a, _ in page.all("img")} == {"data:image/webp;base64"}
    assert any(EVIL in (a["alt"] or "") for a, _ in page.all("img"))
    assert any(text == EVIL for _, text in page.all("figcaption"))


def test_every_picture_is_there_without_the_script_and_says_what_it_is(run: Path) -> None:
    page = Page(html.render(run))
    images = [attributes for attributes, _ in page.all("img")]
    assert len(images) == 4 * len(EPOCHS)
    order = [0, 2, 1, 3]  # one noise of every prompt first
    for place, index in enumerate(order):
        for stage, epoch in enumerate(EPOCHS):
            image = images[place * len(EPOCHS) + stage]
            when = "before training" if not epoch else f"epoch {epoch}, {8 * epoch} pictures scored"
            assert image["alt"] == f"{PROMPTS[index // 2]}, noise {index % 2 + 1}, {when}"
            assert picture(str(image["src"])).getpixel((16, 16)) == colour(epoch, index)
    ((slider, _),) = page.all("input", type="range")
    assert (slider["min"], slider["max"], slider["value"], slider["step"]) == ("0", "2", "2", "1")
    assert slider["aria-valuetext"] == "epoch 4, 32 pictures scored"
    assert [a["for"] for a, _ in page.all("label")] == [slider["id"]]
    assert page.all("html")[0][0]["lang"] == "en"
    headings = [name for name, _, _ in page.found if name in ("h1", "h2", "h3")]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    ids = [a["id"] for _, a, _ in page.found if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_tables_hold_the_numbers(run: Path) -> None:
    page = Page(html.render(run))
    rows = [re.sub(r"\s+", " ", text) for _, text in page.all("tr")]
    assert "unseen animals1.0001.340+0.340+0.280 to +0.40075%40" in rows
    assert "drawing pictures2.0 min33%30 s" in rows
    assert "together6.0 min100%90 s" in rows
    assert "torch9.9" in rows
    assert any(
        "most memory held: process 1.50 GB; evaluations during the run took 36 s." in text for _, text in page.all("p")
    )
    (snippet,) = [text for a, text in page.all("code") if a.get("id") == "snippet"]
    assert f'pipe.load_lora_weights("{run / "model"}")' in snippet
    assert 'DiffusionPipeline.from_pretrained("some/model", revision="abc")' in snippet
    assert 'pipe("a cat", num_inference_steps=7).images[0]' in snippet
    compile(snippet, "snippet", "exec")


FILES = ("config.yaml", "metrics.jsonl", "timings.jsonl", "environment.json", "finished.json", "images/shown.json",
         "evaluation/comparison.json", "evaluation/drift.json", "images/epoch-000002/001.webp")  # fmt: skip


@pytest.mark.parametrize("damage", ["gone", "cut", "nonsense", "list", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_lacks_something_is_reported_and_says_what_it_lacks(run: Path, name: str, damage: str) -> None:
    file = run / name
    whole = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2 + 3])
    elif damage == "nonsense":
        file.write_bytes(b"\xff\xfe\x00{" + bytes(range(256)))
    elif damage == "list":
        file.write_bytes(b"[[], 3, null]")
    elif damage == "folder":
        file.mkdir()
    page = Page(html.render(run))
    said = " ".join(text for _, text in page.all("ul", class_="plain"))
    quiet = name in ("finished.json", "images/shown.json") or (name.endswith("webp") and damage in ("gone",))
    told = Path(name).name in said or (name == "images/epoch-000002/001.webp" and "epoch-000002/001.webp" in said)
    if not quiet and not (name == "config.yaml" and damage == "cut"):
        assert told, said
    assert page.all("p", class_="headline")


def test_random_damage_never_ends_in_a_traceback(run: Path) -> None:
    chance = random.Random(0)
    for _ in range(40):
        file = run / chance.choice(FILES)
        content = bytearray(file.read_bytes())
        for _ in range(chance.randint(1, 8)):
            if content:
                content[chance.randrange(len(content))] = chance.randrange(256)
        file.write_bytes(bytes(content))
        html.render(run)


def test_what_is_no_run_is_refused_in_a_sentence(tmp_path: Path, capsys) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_run_that_is_not_finished_says_how_far_it_is(run: Path) -> None:
    for name in ("finished.json", "evaluation/comparison.json", "evaluation/drift.json"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "reward/me')  # it is writing
    page = Page(html.render(run))
    assert "not finished: 4 of 4 epochs" in page.all("h1")[0][1]
    assert page.all("p", class_="headline")[0][1] == "The training reward went from 0.100 to 0.400 kB."


def test_sheets_of_an_older_version_are_cut_into_their_pictures(tmp_path: Path) -> None:
    for epoch in (0, 5):
        cells = [Image.new("RGB", (64, 64), colour(epoch, index)) for index in range(4)]
        sheet([("a", cells[:2]), ("b", cells[2:])], tmp_path / "images" / f"epoch-{epoch:06d}.png")
    shown = gallery(tmp_path)
    assert shown.epochs == (0, 5)
    assert [(shot.prompt, shot.sample) for shot in shown.shots] == [
        ("prompt 1", 0), ("prompt 1", 1), ("prompt 2", 0), ("prompt 2", 1),
    ]  # fmt: skip
    for index, shot in enumerate(shown.shots):
        found = np.array(picture(str(shot.pictures[1])).getpixel((80, 80)), int)
        np.testing.assert_allclose(found, colour(5, index), atol=4)


def test_pictures_stay_within_their_budget_whatever_they_are(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for epoch in range(14):
        drawn = [Image.fromarray(noise.integers(0, 256, (384, 384, 3), np.uint8)) for _ in range(4)]
        keep_stage(tmp_path / "images", epoch, ["a", "b"], drawn, 2)
    budget = 1_000_000
    shown = gallery(tmp_path, budget=budget)
    assert len(shown.epochs) == 12
    assert (shown.epochs[0], shown.epochs[-1]) == (0, 13)
    spent = sum(len(uri) for shot in shown.shots for uri in shot.pictures if uri)
    assert budget / 4 < spent <= budget
    assert all(all(shot.pictures) for shot in shown.shots)  # smaller ones, rather than fewer
    assert BUDGET * 1.3 < 10_000_000


def test_kept_pictures_are_small_and_small_ones_exact(tmp_path: Path) -> None:
    random_ = np.random.default_rng(0)
    exact = random_.integers(0, 256, (64, 48, 3), np.uint8)
    keep_stage(tmp_path, 3, ["a"], [Image.fromarray(exact), Image.new("RGB", (1024, 512))], 2)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "epoch-000003" / "000.webp")), exact)
    assert Image.open(tmp_path / "epoch-000003" / "001.webp").size == (384, 192)
    assert json.loads((tmp_path / "shown.json").read_text()) == {"prompts": ["a"], "per_prompt": 2}


def test_a_chart_puts_numbers_where_they_belong() -> None:
    """Three points on a straight line lie on one in the drawing; the band's edges are where mean ± spread are."""
    x, y = np.array([0.0, 5, 10]), np.array([0.0, 1, 2])
    drawn = str(chart([Line("mean", x, y, y - 1, y + 1)], "title", "epochs", size=(400, 200)))
    (points,) = re.findall(r'<polyline points="([^"]+)"', drawn)
    (across, down) = np.array([[float(v) for v in pair.split(",")] for pair in points.split()]).T
    assert across[0] == 52
    assert across[2] == 390
    np.testing.assert_allclose(np.diff(across), 169)
    np.testing.assert_allclose(down[0] - down[1], down[1] - down[2], atol=0.11)
    (band,) = re.findall(r'<polygon points="([^"]+)"', drawn)
    corners = [float(pair.split(",")[1]) for pair in band.split()]
    assert max(corners) - min(corners) == pytest.approx(2 * (down[0] - down[2]), abs=0.2)  # from -1 to 3
    assert "mean from 0 to 2, lowest 0, highest 2; over epochs" in drawn
    assert chart([Line("none", x, y * np.nan)], "t", "x") is None


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (-1.81, -1.08, [-1.8, -1.6, -1.4, -1.2]),
        (0, 1e-7, [0, 2e-8, 4e-8, 6e-8, 8e-8, 1e-7]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected) -> None:
    np.testing.assert_allclose(ticks(low, high), expected, atol=1e-12)


def test_long_curves_are_thinned_to_their_ends() -> None:
    line = thinned(Line("l", np.arange(5000.0), np.arange(5000.0)))
    assert len(line.x) <= 400
    assert (line.x[0], line.x[-1]) == (0, 4999)


def test_an_interval_is_drawn_around_zero() -> None:
    drawn = str(interval(-0.5, 0.0, 0.5, 1.0))
    assert 'x1="31.0" x2="89.0"' in drawn
    assert 'cx="60.0"' in drawn


def test_markup_escapes_all_that_was_not_made_here() -> None:
    assert tag("p", "<b>", raw("<i></i>"), None, [1, "&"], class_='"x"') == (
        '<p class="&quot;x&quot;">&lt;b&gt;<i></i>1&amp;</p>'
    )
    assert tag("img", alt="a'b", hidden=True, src=None) == '<img alt="a&#x27;b" hidden>'
    assert join(["<", tag("br")]) == "&lt;<br>"


def test_the_names_of_files_are_those_that_runs_write() -> None:
    for name in ("CONFIG", "METRICS", "TIMINGS", "ENVIRONMENT", "FINISHED", "STACKS"):
        assert getattr(record, name) == getattr(claim, name)


RECIPE = """
model: {{name: {model}, lora_rank: 4}}
prompts: {folder}/prompts.txt
sampling: {{num_inference_steps: 2, guidance_scale: 2.0, height: 16, width: 16}}
train: {{epochs: 2, samples_per_epoch: 4, group_size: 2, batch_size: 4, learning_rate: 1.0e-3}}
evaluation: {{samples_per_prompt: 1}}
run: {{output_dir: {folder}/run, checkpoint_every: 1, sample_prompts: 2}}
"""


def test_a_real_run_ends_with_its_report(tmp_path: Path, capsys) -> None:
    tiny.tiny_sd().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text(f"a cat\n{EVIL}\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tmp_path / "model", folder=tmp_path))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    said = capsys.readouterr().out.strip().splitlines()
    assert said[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert len(page.all("img")) == 4 * 3
    first = np.asarray(Image.open(tmp_path / "run" / "images" / "first" / "000.png").convert("RGB"))
    np.testing.assert_array_equal(np.asarray(picture(str(page.all("img")[0][0]["src"]))), first)
    assert not page.all("ul", class_="plain") or "not there" not in page.all("ul", class_="plain")[-1][1]
    assert json.loads((tmp_path / "run" / "timings.jsonl").read_text().splitlines()[0])["memory/gb"] > 0.05
