"""The page holds what the run found, escapes what the data say, and loads nothing."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from codec_dist.report import ReportError, build_report, findings
from codec_dist.report.gallery import data_uri

COMMANDS = {
    "extract": ("Nothing is extracted yet", "codec-dist extract"),
    "train": ("No SAE is trained yet", "codec-dist train"),
    "summarize": ("Modes were not summarized yet", "codec-dist summarize"),
    "intervene": ("No channel was intervened on yet", "codec-dist intervene"),
    "visualize": ("The pictures are not drawn yet", "codec-dist visualize"),
}
STAGES = list(COMMANDS)
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, the text of the page, and tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.unmatched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unmatched.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def build(run: Any) -> str:
    path = build_report(run.directory, run.config)
    assert path == run.directory / "report" / "index.html"
    return path.read_text(encoding="utf-8")


def test_page_shows_the_headline_numbers(make_run: Any) -> None:
    page = Page(build(make_run()))
    assert not page.unmatched
    assert page.open == []
    assert "16 images" in page.text.replace("images 16", "16 images")
    # Of the evaluate part's 9 labelled images (7 in the first shard, 1 without; 1 of 2 in the second), one in each
    # shard's row 1 is answered wrongly, and that row of the second shard is of the fit part.
    assert "87.5 %" in page.text
    assert "0.80" in page.text  # median EV of .9, .8, .7
    assert "−0.40" in page.text  # best relative AUC
    assert "9 of 12; 6 class-correlated" in page.text.replace("alive contribution modes 9", "9")


def test_every_section_is_there_in_order(make_run: Any) -> None:
    text = build(make_run())
    order = [
        'id="findings"', 'id="paper-findings"', 'id="layers"', 'id="saes"', 'id="modes"', 'id="gallery"', 'id="causal"',
        'id="trust"', 'id="settings"', 'id="continue"',
    ]  # fmt: skip
    places = [text.index(one) for one in order]
    assert places == sorted(places)
    links = {attributes["href"] for tag, attributes in Page(text).elements if tag == "a"}
    ids = {attributes["id"] for _, attributes in Page(text).elements if "id" in attributes}
    assert {link[1:] for link in links} <= ids


def test_ids_are_unique_and_tabs_name_their_panels(make_run: Any) -> None:
    elements = Page(build(make_run())).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    tabs = [attributes for _, attributes in elements if attributes.get("role") == "tab"]
    assert len(tabs) == 6
    assert {tab["aria-controls"] for tab in tabs} <= set(ids)


def test_every_picture_and_chart_says_what_it_shows(make_run: Any) -> None:
    elements = Page(build(make_run())).elements
    pictures = [attributes for tag, attributes in elements if tag == "img"]
    assert len(pictures) == 3 * 2 * 2 * 3
    assert all(picture["alt"] for picture in pictures)
    charts = [attributes for tag, attributes in elements if tag == "svg"]
    assert all(chart.get("aria-label") or chart.get("aria-hidden") for chart in charts)
    assert sum("aria-label" in chart for chart in charts) > 20


HOSTILE = "<script>alert(1)</script>"
QUOTES = "\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"


def test_markup_in_keys_classes_layers_and_names_stays_text(make_run: Any) -> None:
    words = type(make_run(stages=[]).words)(
        name=HOSTILE + QUOTES,
        classes=[HOSTILE, QUOTES, "</title></style></script>"],
        key=HOSTILE + "{}" + QUOTES.replace("{{ 7 * 7 }}", ""),
        layers=[f"blocks.0{HOSTILE}", f"blocks.1{QUOTES}", "blocks.2"],
    )
    run = make_run(words=words, name="hostile")
    text = build(run)
    assert HOSTILE not in text
    assert "<img src=x" not in text
    assert "</title></style>" not in text
    page = Page(text)
    assert not page.unmatched
    assert [tag for tag, _ in page.elements if tag == "script"] == ["script"]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert HOSTILE in page.text  # shown, as the text that it is
    assert "{{ 7 * 7 }}" in page.text


def test_page_loads_nothing_and_forbids_itself_to(make_run: Any) -> None:
    text = build(make_run())
    for tag, attributes in Page(text).elements:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            target = attributes.get(name, "#")
            assert target.startswith(("#", "data:")), (tag, target)
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for _, a in Page(text).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "http" not in policy


@pytest.mark.parametrize("done", range(len(STAGES) + 1))
def test_what_a_stage_has_not_made_is_left_out_with_the_command_that_makes_it(make_run: Any, done: int) -> None:
    text = Page(build(make_run(stages=STAGES[:done]))).text
    for number, (line, command) in enumerate(COMMANDS.values()):
        if number < done:
            assert line not in text
        elif STAGES[number] != "visualize" or "summarize" in STAGES[:done]:
            assert line in text
            assert command in text


def test_modes_without_pictures_are_shown_by_their_numbers(make_run: Any) -> None:
    page = Page(build(make_run(stages=["extract", "train", "summarize"])))
    assert "Mode 2 class two r = 0.70" in page.text
    assert not [tag for tag, _ in page.elements if tag == "img"]


ALL = {"prepare", *STAGES}
LEFT_OUT = "of other settings, or of a stage that did not finish"


@pytest.mark.parametrize("shown", [ALL - {stage} for stage in STAGES] + [{"prepare", "extract", "train"}, set()])
def test_results_of_other_settings_are_treated_as_not_made(make_run: Any, shown: set[str]) -> None:
    run = make_run()
    page = Page(build_report(run.directory, run.config, shown).read_text(encoding="utf-8"))
    for stage, (line, command) in COMMANDS.items():
        # Without modes there is no gallery to draw pictures in.
        said = stage not in shown and (stage != "visualize" or "summarize" in shown)
        assert (line in page.text) == said
        assert command in page.text or not said
    missing = [stage for stage in ("prepare", *STAGES) if stage not in shown]
    assert f"did not finish: {', '.join(missing)}." in page.text
    assert LEFT_OUT in page.text
    assert ("median EV of contribution SAEs" in page.text) == ("train" in shown)
    assert ("best relative ablation AUC" in page.text) == ("intervene" in shown)
    assert any(tag == "img" for tag, _ in page.elements) == ({"summarize", "visualize"} <= shown)


def test_new_saes_lend_no_channels_to_pictures_of_old_modes(make_run: Any) -> None:
    run = make_run()
    page = build_report(run.directory, run.config, {"prepare", "extract", "train"}).read_text(encoding="utf-8")
    assert "Top channels" in build(run)
    assert "Top channels" not in page
    assert "channel 0" not in page


def test_a_split_of_other_settings_counts_for_nothing(make_run: Any) -> None:
    run = make_run()
    text = Page(build_report(run.directory, run.config, {"extract"}).read_text(encoding="utf-8")).text
    assert "not split into parts yet" in text
    assert "model accuracy" not in text
    assert "median over stored images (there is no split yet)" in text


def test_nothing_is_said_of_other_settings_where_all_is_current(make_run: Any) -> None:
    run = make_run(stages=STAGES[:2])
    for current in (None, ALL, {"prepare", *STAGES[:2]}):
        text = build_report(run.directory, run.config, current).read_text(encoding="utf-8")
        assert "other settings" not in text
        assert "other settings" not in str(findings(run.directory, current))


def test_findings_leave_out_results_of_other_settings(make_run: Any) -> None:
    shown = str(findings(make_run().directory, {"prepare", "extract", "train"}))
    (row,) = (line for line in shown.splitlines() if line.startswith("blocks.1"))
    assert row.split() == ["blocks.1", "–", "–", "–", "0.80", *["–"] * 4]
    assert "left out, of other settings or an earlier version: summarize, intervene, visualize" in shown


def test_saes_of_an_earlier_plan_are_not_shown(make_run: Any) -> None:
    run = make_run()
    selected = json.loads((run.directory / "sae" / "selected.json").read_text())
    current = [folder for quantities in selected.values() for folder in quantities.values()]
    old = Path(current[0]).with_name(f"{'1' * 12}-s0")
    shutil.copytree(run.directory / "sae" / current[0], run.directory / "sae" / old)

    def rows() -> int:
        section = build(run).partition('id="saes"')[2].partition("</table>")[0]
        return len(re.findall(r'<th scope="row">', section))

    assert rows() == len(current) + 1  # no plan is kept: all that are there
    plan = run.directory / "sae" / "trained.json"
    plan.write_text(json.dumps(current))
    assert rows() == len(current)
    plan.write_text(json.dumps([*current, str(old), "blocks.0/contribution-positive/not-finished-s0"]))
    assert rows() == len(current) + 1


def test_images_without_labels_are_reported_without_what_is_about_classes(make_run: Any) -> None:
    run = make_run(words=type(make_run(stages=[]).words)(labelled=False), name="unlabelled")
    page = Page(build(run))
    assert not page.unmatched
    for reason in (
        "so the model's accuracy is not known",
        "the dimensionality of class means is not defined",
        "no mode is class-correlated",
        "There are no pictures: a map explains a class, and no image of the evaluate part has a label",
        "There are no causal tests: they compare accuracies of classes, and no image of the evaluate part has a label",
        "Not defined here: it is about classes",
    ):
        assert reason in page.text
    assert not any(command in page.text for _, command in COMMANDS.values())  # nothing is left to be run
    assert "model accuracy" not in page.text
    assert "9 of 12; 0 class-correlated" in page.text.replace("alive contribution modes 9", "9")
    assert "Contributions are sparser than activations at every layer The median" in page.text
    assert "model accuracy" not in str(findings(run.directory))


def test_interventions_without_trials_say_why(make_run: Any) -> None:
    run = make_run()
    for path in (run.directory / "interventions").glob("*.parquet"):
        pq.write_table(pq.read_schema(path).empty_table(), path)
    text = Page(build(run)).text
    assert "no class has both images in the evaluate part and a mode that stands for it" in text
    assert "codec-dist intervene" not in text
    assert "Not defined at any layer for both" in text
    assert "relative ablation AUC" not in str(findings(run.directory)).splitlines()[0]


def test_each_causal_claim_stands_beside_its_interval_and_its_null(make_run: Any) -> None:
    text = Page(build(make_run())).text
    # Headline: relative AUC, its interval over classes, and that of random channels.
    assert "95 %: −0.55 to −0.25; random channels: −0.24 to 0.22, p = 0.048" in text
    # The numbers under the chart, of contribution and of activation modes.
    for name, value, ends in (
        ("contribution", "−0.400", "−0.550 to −0.250"),
        ("activation", "−0.200", "−0.350 to −0.050"),
    ):
        row = f"blocks.1 {name} modes {value} {ends} {value} 0.070 3 0.010 −0.240 to 0.220 20 0.048"
        assert row in text
    # The verdict: lower than activation modes, and beyond what random channels give.
    assert "by contribution modes at 3 of 3 layers and by activation modes at 0 of 3 layers" in text
    assert "Whiskers: 95 % bootstrap interval over 3 target classes" in text


def test_results_in_an_earlier_format_are_left_out_with_the_command_that_makes_them_again(make_run: Any) -> None:
    run = make_run()
    path = run.directory / "interventions" / "curves.parquet"
    old = pq.read_table(path).replace_schema_metadata(None).rename_columns({"subjects": "trials"})
    pq.write_table(old, path)
    text = Page(build(run)).text
    assert "There are results of intervene , but of an earlier version" in text
    assert "codec-dist intervene" in text
    assert "relative ablation AUC" not in text.partition("Causal tests")[0].partition("Findings of the paper")[0]
    assert "an earlier version: intervene" in str(findings(run.directory))


def test_findings_are_a_table_for_the_terminal(make_run: Any) -> None:
    run = make_run()
    shown = str(findings(run.directory))
    assert "model accuracy: 87.5 % (on the evaluate part)" in shown
    (row,) = (line for line in shown.splitlines() if line.startswith("blocks.1"))
    chance = ["−0.24", "to", "0.22", "0.048"]
    assert row.split() == ["blocks.1", "0.50", "0.40", "0.50", "0.80", "3", "−0.40", *chance]
    assert "holds:" in shown


def test_dropped_images_and_pending_shards_are_named(make_run: Any) -> None:
    run = make_run()
    (run.directory / "store" / "ledger" / "000001.json").unlink()
    text = Page(build(run)).text
    assert "Images that were dropped (1)" in text
    assert "image-bad-0 in digits-000000.tar" in text
    assert "Shards that are not done digits-000001.tar" in text
    assert "1 of 2 shards are done" in text


def test_completeness_is_judged_in_words(make_run: Any) -> None:
    # Residuals of .1, .2 and .3 where the target changes by 2; of 50 on images that are not of the evaluate part.
    text = Page(build(make_run())).text
    assert "median over images of the evaluate part" in text
    assert "blocks.2 15.00 % 15.00 % 15.00 % 15.00 % 0.300 2.000 10" in text
    assert "nearly complete The median relative residual is 15.0 % at the worst layer (blocks.2)" in text


def test_config_is_shown_as_it_is(make_run: Any) -> None:
    run = make_run()
    assert "correlation_threshold: 0.2" in build(run)
    assert f"codec-dist run {run.directory / 'config.yaml'}" in Page(build(run)).text


def test_building_again_replaces_the_page(make_run: Any) -> None:
    run = make_run(stages=["extract"])
    first = build(run)
    assert len(build(make_run(name="other"))) > len(first)
    assert [path.name for path in (run.directory / "report").iterdir()] == ["index.html"]


def test_a_folder_without_a_run_is_refused(make_run: Any, tmp_path: Path) -> None:
    run = make_run(stages=[])
    with pytest.raises(ReportError, match="no run"):
        build_report(tmp_path / "none", run.config)


@pytest.mark.parametrize(
    ("file", "content"),
    [("modes/modes.parquet", b"no parquet"), ("figures/maps.json", b"{"), ("split.parquet", b""),
     ("sae/selected.json", b"["), ("sae/trained.json", b"{}")],
)  # fmt: skip
def test_a_damaged_file_is_named_in_one_line(make_run: Any, file: str, content: bytes) -> None:
    run = make_run()
    (run.directory / file).write_bytes(content)
    with pytest.raises(ReportError) as error:
        build_report(run.directory, run.config)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_picture_or_one_outside_is_refused(make_run: Any) -> None:
    run = make_run()
    maps = run.directory / "figures" / "maps.json"
    entries = json.loads(maps.read_text())
    for wrong, words in (("gone.png", "gone.png"), ("../config.yaml", "outside")):
        maps.write_text(json.dumps([{**entries[0], "map": wrong}]))
        with pytest.raises(ReportError, match=re.escape(words)):
            build_report(run.directory, run.config)


def test_small_pictures_are_kept_bit_by_bit_and_large_ones_shrink(tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.new("L", (36, 16), 99).save(small)
    Image.effect_noise((448, 224), 60).convert("RGB").save(large)
    source, width, height = data_uri(small)
    assert (width, height) == (36, 16)
    assert base64.b64decode(source.partition(",")[2]) == small.read_bytes()
    source, width, height = data_uri(large)
    assert source.startswith("data:image/webp;base64,")
    content = base64.b64decode(source.partition(",")[2])
    assert len(content) < large.stat().st_size / 2
    assert Image.open(io.BytesIO(content)).size == (width, height) == (448, 224)
