"""The page of a run, as a file and in a real browser."""

from __future__ import annotations

import html
import html.parser
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.page import build_report, compare_runs, read_run, read_runs
from moelora.errors import ReportError
from moelora_cli import main
from tests.eval.page.sample import ADAPTERS, LAYERS, TASKS, metrics, routing, stage_metrics, write_run, write_sequential

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))),
    None,
)


class _Page(html.parser.HTMLParser):
    """Counts elements and collects what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "srcset", "href") and value]


def test_the_command_writes_one_page_without_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    file = Path(capsys.readouterr().out.strip())
    assert file == run / "report.html"
    text = file.read_text()
    page = _Page(text)
    assert all(link.startswith("#") for link in page.fetched)
    assert "url(" not in text
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert page.tags.count("section") == 5
    # the numbers are in the text itself, for whoever runs no script
    for expected in (
        "mixlora on tiny-base",
        "4 of rank 2, top 2 per token",
        "52.5",
        "50,000 (5.0% of the base)",
        "0.001",
    ):
        assert expected in text
    assert text.count("▼") == 2 + 2  # one score at its floor in each evaluation, and the note of each
    assert "moelora eval runs/x" in text
    assert "0123456789ab with local changes" in text
    assert main(["report", str(run), "--output", str(tmp_path / "deep/page.html")]) == 0
    assert (tmp_path / "deep/page.html").read_text() == text


def test_texts_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    text = build_report(write_run(tmp_path)).read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    content = json.loads(data)
    assert content["routing"][0]["texts"][0]["tokens"] == routing()["texts"][0]["tokens"]
    assert "<b>2</b>" not in text
    assert _Page(text).tags.count("script") == 2


def test_what_is_there_is_read(tmp_path: Path) -> None:
    content = read_run(write_run(tmp_path))
    assert [each["name"] for each in content["evaluations"]] == ["tasks of the run", "commonsense-loglik"]
    assert content["evaluations"][1]["protocol"] == "loglik"
    cells = content["evaluations"][0]["rows"][0]["cells"]
    assert cells["base"] == {"value": 0.1, "stderr": 0.05, "at_floor": True}
    assert not cells["MixLoRA"]["at_floor"]
    assert content["routing"][0]["kinds"] == {"self_attn.q_proj": [0, 2, 4], "mlp": [1, 3, 5]}
    titles = [curve["title"] for curve in content["curves"]]
    assert titles == ["loss", "accuracy of answer tokens", "balance loss", "entropy of the load"]
    assert [series["name"] for series in content["curves"][0]["series"]] == ["adapter", "baseline"]
    assert content["missing"] == []


@pytest.mark.parametrize(("adapter", "fact"), ADAPTERS)
def test_what_an_adapter_is_is_read_of_any_format(
    tmp_path: Path, adapter: dict[str, Any], fact: list[str] | None
) -> None:
    facts = read_run(write_run(tmp_path, adapter))["facts"]
    assert [each for each in facts if each[0] in ("experts", "rank")] == ([] if fact is None else [fact])


def test_a_part_that_is_missing_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(metrics()))
    text = build_report(tmp_path).read_text()
    assert "No training curves" in text
    assert "No routing" in text
    assert 'id="scores"' in text
    assert 'id="maps"' not in text


def _texts(table: dict[str, Any]) -> dict[str, list[str]]:
    return {row["name"]: [cell["text"] for cell in row["cells"]] for row in table["rows"]}


def test_a_sequential_run_shows_which_expert_answers_and_what_is_forgotten(tmp_path: Path) -> None:
    content = read_run(write_sequential(tmp_path))
    (table,) = content["compositions"]
    assert table["columns"] == ["sums", "names", "base model"]
    assert _texts(table) == {"sums": ["45 (75%)", "12 (20%)", "3 (5%)"], "names": ["0 (0%)", "60 (100%)", "0 (0%)"]}
    (kept,) = content["forgetting"]
    assert _texts(kept["matrix"]) == {
        "base model": ["10.0", "25.0"],
        "after 1: sums": ["60.0", "20.0"],
        "after 2: names": ["45.0", "70.0"],
        "forgotten": ["+15.0", ""],
    }
    assert kept["curve"]["series"][0] == {"name": "sums", "points": [[1, 0.6], [2, 0.45]]}
    text = build_report(tmp_path).read_text()
    assert "Which expert answers which task" in text
    assert "after 2: names" in text

    # before the first stage is scored, the page says how to
    (tmp_path / "stages/1-sums/metrics.json").unlink()
    content = read_run(tmp_path)
    assert content["forgetting"] == []
    (note,) = content["missing"]
    assert f"moelora eval {tmp_path} --stages" in note

    fewer = stage_metrics(0.6, 0.2)
    fewer["tasks"]["sums"]["n"] = 30
    (tmp_path / "stages/1-sums/metrics.json").write_text(json.dumps(fewer))
    content = read_run(tmp_path)
    assert content["forgetting"] == []
    assert "adapter: its stages were scored on different problems, which cannot be compared" in content["missing"][0]


def test_a_mixture_of_named_experts_shows_the_load_by_task(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    experts = {"kind": "lora_composed", "num_experts": 4, "r": 2, "names": names}
    (table,) = read_run(write_run(tmp_path, ADAPTERS[0][0] | {"experts": experts}))["compositions"]  # not that of 6
    assert table["columns"] == names
    loads = routing()["load"][TASKS[0]]
    shares = [f"{100 * sum(row[expert] for row in loads) / len(loads):.1f}" for expert in range(4)]
    assert _texts(table)[TASKS[0]] == shares


def test_several_runs_are_put_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    better = metrics()
    better["scores"][1]["value"] = 0.8
    better["tasks"]["names"]["n"] = 30  # another set of problems: not in one line, and neither is the mean
    for row in better["scores"][2:4]:
        row["n"] = 30
    (other / "metrics.json").write_text(json.dumps(better))
    assert main(["report", "one", "other"]) == 0
    assert Path(capsys.readouterr().out.strip()) == Path("report.html")
    content = compare_runs(read_runs([one, other]))
    assert [row[0] for row in content["runs"]["rows"]] == [str(one), str(other)]
    own, commonsense = content["evaluations"]
    cells = [
        (
            row["task"],
            row["n"],
            {model.removeprefix(str(tmp_path)): cell["value"] for model, cell in row["cells"].items()},
        )
        for row in own["rows"]
    ]
    assert cells == [
        ("sums", 60, {"base": 0.1, "/one: MixLoRA": 0.45, "/other: base": 0.1, "/other: MixLoRA": 0.8}),
        ("names", 60, {"base": 0.3, "/one: MixLoRA": 0.6}),
        ("names", 30, {"/other: base": 0.3, "/other: MixLoRA": 0.6}),
        ("mean of tasks", 60, {"base": 0.2, "/one: MixLoRA": 0.525}),
        ("mean of tasks", 60, {"/other: base": 0.2, "/other: MixLoRA": 0.525}),
    ]
    # where everything is the same, the base model has one column
    assert [model.removeprefix(str(tmp_path)) for model in commonsense["models"]] == [
        "base",
        "/one: MixLoRA",
        "/other: MixLoRA",
    ]
    assert [series["name"] for series in content["curves"][0]["series"]] == [
        str(one),
        f"{one}, baseline",
        str(other),
        f"{other}, baseline",
    ]
    assert len(content["routing"]) == 4
    text = (tmp_path / "report.html").read_text()
    assert "2 runs compared" in text
    assert main(["report", "one", "../" + tmp_path.name + "/one"]) == 1
    assert "'one' is given twice; allowed: each run once" in capsys.readouterr().err


def test_the_content_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert main(["report", "--json", str(run)]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": {str(run): read_run(run)}}
    assert not (run / "report.html").exists()


def test_every_table_says_what_it_is_and_names_escape(tmp_path: Path) -> None:
    run = write_sequential(tmp_path)
    words = json.loads((run / "metrics.json").read_text())
    words["chosen"] = {'"><img src=x>': {"<b>a</b>": 1}}
    (run / "metrics.json").write_text(json.dumps(words))
    text = build_report(run).read_text()
    assert "<img" not in text
    assert "<b>a</b>" not in text
    static = text.partition("<script")[0]
    assert static.count("<table") == static.count("<caption>") + static.count('<table id="similarity"')
    assert not re.findall(r"<th(?! scope=)[ >]", static)
    levels = [int(level) for level in re.findall(r"<h([1-6])", static)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, "", "holds nothing to report"),
        ("metrics.json", "{", "is not JSON"),
        ("config.yaml", "a: [", "is not YAML"),
        ("routing.json", '{"layers": ["a.0.b"], "tasks": {}}', "lacks 'load'; let `moelora eval` write it again"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path: Path, file: str | None, content: str, message: str) -> None:
    if file:
        (tmp_path / file).write_text(content)
    with pytest.raises(ReportError, match=message):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_command_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder. Give the folder of a run, such as runs/quickstart." in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(write_run(tmp_path))]) == 1
    assert "pip install jinja2 matplotlib" in capsys.readouterr().err


# What a reader does, and what has to be on the page then; the outcome is left in the title, which the browser prints.
SCRIPT = """
<script>
const found = {};
window.addEventListener("error", (event) => { found.error = event.message; });
const change = (id, value, kind = "change") => { byId(id).value = value; byId(id).dispatchEvent(new Event(kind)); };
const pixels = () => [...document.querySelectorAll("#maps canvas")].map((canvas) => {
  const { width, height } = canvas;
  return [width, height, new Set(canvas.getContext("2d").getImageData(0, 0, width, height).data).size];
});
found.curves = document.querySelectorAll("#curves svg polyline").length;
found.maps = pixels();
found.sources = byId("source").options.length;
found.kinds = [...byId("kind").options].map((option) => option.value);
found.similarity = [...document.querySelectorAll("#similarity td")].map((cell) => cell.textContent).filter(Boolean);
found.tokens = [...document.querySelectorAll("#token-text span")].map((token) => token.firstChild.textContent);
found.first = byId("layer-name").textContent;
const colors = () => [...document.querySelectorAll("#token-text span")].map((token) => token.style.background).join();
const before = colors();
change("layer", "1", "input");
found.layer = byId("layer-name").textContent;
found.recoloured = colors() !== before;
change("kind", "mlp");
found.other = byId("layer-name").textContent;
const numbered = () => document.querySelectorAll("#token-text sub").length;
found.numbered = [numbered()];
byId("numbers").click();
found.numbered.push(numbered());
document.querySelector("#token-text span").focus();
found.detail = byId("token-detail").textContent;
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
press("ArrowRight");
press("ArrowRight");
press("ArrowLeft");
found.moved = byId("token-detail").textContent;
found.stops = document.querySelectorAll("#token-text [tabindex='0']").length;
// what a screen reader gets: a name for each picture, a caption for each table, a label for each control
const unnamed = (selector, has) => [...document.querySelectorAll(selector)].filter((node) => !has(node)).length;
found.unnamed = [
  unnamed("svg:not([aria-hidden]), canvas", (node) => node.role === "img" && node.ariaLabel),
  unnamed("table", (node) => node.caption && node.caption.textContent),
  unnamed("select, input", (node) => node.labels.length),
  unnamed("th", (node) => node.scope),
];
const lines = [...document.querySelectorAll("#curves figure:first-child polyline")];
found.dashes = new Set(lines.map((each) => each.getAttribute("stroke-dasharray"))).size;
document.querySelector("input[value=difference]").click();
found.scale = byId("scale").textContent;
byId("map-numbers").open = true;
byId("map-numbers").dispatchEvent(new Event("toggle"));
found.cells = document.querySelectorAll("#map-tables td").length;
change("source", "1");
found.second = pixels().map((each) => each[0]);
byId("text").options[0].textContent = "a long text ".repeat(20);
found.wide = document.documentElement.scrollWidth <= document.documentElement.clientWidth;
document.title = JSON.stringify(found);
</script>
"""


def _browse(page: Path, folder: Path, width: int, *words: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder}",
        f"--window-size={width},1000",
        *words,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_real_browser(tmp_path: Path, width: int) -> None:
    page = build_report(write_run(tmp_path / "run"))
    checked = tmp_path / "checked.html"
    checked.write_text(page.read_text().replace("</body>", f"{SCRIPT}</body>"))
    shown = _browse(checked, tmp_path / "profile", width, "--dump-dom")
    (title,) = re.findall(r"<title>(\{.*?\})</title>", shown, re.DOTALL)
    found: dict[str, Any] = json.loads(html.unescape(title) if "&" in title else title)
    assert "error" not in found
    assert found["curves"] == 2 * 4
    assert found["maps"] == [[4, 3, found["maps"][0][2]], [4, 3, found["maps"][1][2]]]
    assert min(each[2] for each in found["maps"]) > 5  # colours
    assert found["sources"] == 2
    assert found["kinds"] == ["self_attn.q_proj", "mlp"]
    assert found["similarity"] == ["(0.97)", "0.61", "0.61", "(0.97)"]
    assert found["tokens"] == routing()["texts"][0]["tokens"]
    assert (found["first"], found["layer"], found["other"]) == (LAYERS[0], LAYERS[2], LAYERS[3])
    assert found["recoloured"]
    assert found["numbered"] == [8, 0]
    assert found["moved"] == f"“is”: expert 0, weight 51 % in {LAYERS[3]}"
    assert found["stops"] == 1
    assert found["unnamed"] == [0, 0, 0, 0]
    assert found["dashes"] == 2
    assert found["cells"] == 2 * 3 * 4
    assert found["detail"] == f"“What”: expert 3, weight 50 % in {LAYERS[3]}"
    assert "of the choices" in found["scale"]
    assert found["second"] == [6, 6]
    assert found["wide"], "the page is wider than the window"

    picture = tmp_path / "picture.png"
    _browse(page, tmp_path / "profile2", width, f"--screenshot={picture}")
    with Image.open(picture) as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
