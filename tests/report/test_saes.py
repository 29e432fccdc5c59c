"""What the report says about several SAEs of one layer: which there are, what sparsity costs, and why one is used."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from codec_dist.report import ReportError, build_report
from codec_dist.report.run_data import read_run
from codec_dist.report.saes import configurations
from codec_dist.report.tradeoff import trade_offs
from codec_dist.sae import build

LAYER, QUANTITY = "blocks.1", "contribution-positive"
SETTINGS = {"epochs": 20, "batch_size": 128, "learning_rate": 0.002}


def add_sae(run: Any, name: str, ev: float, l0: float, epochs: int = 20, **options: Any) -> str:
    """A finished SAE of the layer; ``name`` is the folder's, ending in the seed."""
    folder = run.directory / "sae" / LAYER / QUANTITY / name
    details = {"training": {**SETTINGS, "epochs": epochs}}
    sae = build("topk", {"modes": 4, **options}, 6)
    sae.save(folder, details=details)
    report = {"ev": ev, "l0": l0, "dead_fraction": 0.25}
    place = {"layer": LAYER, "quantity": QUANTITY, "architecture": "topk"}
    (folder / "metrics.json").write_text(json.dumps({**place, "select": report, "evaluate": report, "training": {}}))
    return f"{LAYER}/{QUANTITY}/{name}"


def choose(run: Any, folder: str, reason: str, stability: dict[str, float] | None = None) -> None:
    selected = json.loads((run.directory / "sae/selected.json").read_text())
    selected[LAYER][QUANTITY] = folder
    (run.directory / "sae/selected.json").write_text(json.dumps(selected))
    place = {"layer": LAYER, "quantity": QUANTITY}
    saes = [{"folder": name, **place, "stability": value} for name, value in (stability or {}).items()]
    content = {
        "criterion": {"l0": None, "tolerance": 0.1, "ev_kept": 0.95, "minimum_stability": None},
        "choices": [{**place, "folder": folder, "reason": reason}],
        "saes": saes,
    }
    (run.directory / "sae/selection.json").write_text(json.dumps(content))


@pytest.fixture
def sweep(make_run: Any) -> Any:
    """A run with three configurations at one layer (one has three seeds), beside one SAE everywhere else."""
    run = make_run()
    shutil.rmtree(run.directory / "sae" / LAYER / QUANTITY)
    saes = [add_sae(run, f"aaaa-s{seed}", ev, 1.0, k=1) for seed, ev in enumerate((0.5, 0.6, 0.7))]
    add_sae(run, "bbbb-s0", 0.9, 2.0, k=2)
    add_sae(run, "cccc-s0", 0.8, 2.0, k=2, auxk=1)
    choose(run, saes[1], "it <b>is</b> sparsest", dict.fromkeys(saes, 0.75))
    return run


def section(run: Any) -> str:
    text = build_report(run.directory, run.config).read_text(encoding="utf-8")
    found = re.search(r'<section id="saes">.*?</section>', text, re.DOTALL)
    assert found is not None
    return found[0]


def rows(html: str) -> list[list[str]]:
    body = re.search(r"<table class=\"sortable\">.*?<tbody>(.*?)</tbody>", html, re.DOTALL)
    assert body is not None
    return [
        [
            " ".join(re.sub("<.*?>", " ", cell).split())
            for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL)
        ]
        for row in re.findall(r"<tr>(.*?)</tr>", body[1], re.DOTALL)
    ]


def test_seeds_are_one_row_with_their_means_and_stability(sweep: Any) -> None:
    ours = [row for row in rows(section(sweep)) if row[:2] == [LAYER, QUANTITY]]
    assert len(ours) == 3
    used, *others = ours
    # layer, quantity, architecture, settings, used, modes, EV, L0, dead, stability, seeds
    assert used[2:11] == ["topk", "k = 1, auxk = 3", "✓ used", "4", "0.600", "1.00", "25.0 %", "0.75", "3"]
    assert [row[3] for row in others] == ["k = 2, auxk = 3", "k = 2, auxk = 1"]
    assert [row[9] for row in others] == ["–", "–"]


def test_only_settings_that_differ_or_say_how_sparse_it_is_are_shown(make_run: Any) -> None:
    run = make_run()
    assert {row[3] for row in rows(section(run))} == {"k = 2"}
    add_sae(run, "bbbb-s0", 0.9, 3.0, k=3)
    add_sae(run, "cccc-s0", 0.9, 3.0, k=3, epochs=40, decoder_bias="none")
    shown = {row[3] for row in rows(section(run)) if row[:2] == [LAYER, QUANTITY]}
    assert shown == {
        "k = 2, decoder_bias = geometric_median",
        "k = 3, decoder_bias = geometric_median, epochs = 20",
        "k = 3, decoder_bias = none, epochs = 40",
    }


def test_trade_off_is_drawn_with_the_used_one_ringed_and_the_reason_as_text(sweep: Any) -> None:
    html = section(sweep)
    assert html.count('class="ring"') == 2  # explained variance, and stability
    assert "In use: it &lt;b&gt;is&lt;/b&gt; sparsest." in html
    assert "the sparsest that keeps 95 % of the highest EV" in html
    charts = re.findall(r'<svg[^>]*class="chart tradeoff">.*?</svg>', html, re.DOTALL)
    assert len(charts) == 2
    # The one with AuxK lies below the line: as sparse, explaining less.
    assert charts[0].count("hollow") == 1
    assert 'class="whisker contribution"' in charts[0]
    assert "stability 0.75 over 3 seeds; used by later stages" in charts[0]
    assert "One SAE was trained for each layer" not in html


def test_one_sae_each_has_nothing_to_compare_and_says_how_to(make_run: Any) -> None:
    html = section(make_run())
    assert "tradeoff" not in html
    assert "nothing to compare" in html
    assert "grid: {modes: [32, 128], k: [1, 2, 4, 8, 16]}" in html


@pytest.mark.parametrize(
    ("evs", "l0s", "front"),
    [
        ([0.5, 0.6, 0.7], [1, 2, 3], [0, 1, 2]),
        ([0.5, 0.4, 0.7], [1, 2, 3], [0, 2]),
        ([0.7, 0.6, 0.5], [1, 2, 3], [0]),
        ([0.5, 0.6, 0.7], [2.0, 2.02, 4], [1, 2]),  # 2.0 and 2.02 loadings are the same sparsity
    ],
)
def test_line_joins_what_nothing_sparser_excels(
    make_run: Any, evs: list[float], l0s: list[float], front: list[int]
) -> None:
    run = make_run()
    shutil.rmtree(run.directory / "sae" / LAYER / QUANTITY)
    for number, (ev, l0) in enumerate(zip(evs, l0s, strict=True)):
        add_sae(run, f"{number}-s0", ev, l0, k=2)
    data = read_run(run.directory)
    (layer,) = trade_offs(data, configurations(data))
    (one,) = layer.quantities
    full = re.findall(r'class="mark contribution"[^>]*><title>[^<]*EV ([\d.]+)', str(one.explained))
    assert sorted(full) == sorted(f"{evs[number]:.3f}" for number in front)


def test_explained_variance_that_is_not_defined_is_left_out_of_the_chart(make_run: Any) -> None:
    run = make_run()
    folder = run.directory / "sae" / add_sae(run, "bbbb-s0", 0.9, 2.0, k=2)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["evaluate"]["ev"] = None
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert len(re.findall(r'class="mark contribution[^"]*"', section(run).partition("<h4>Training")[0])) == 1


def test_many_saes_are_not_all_drawn_over_epochs(make_run: Any) -> None:
    run = make_run()
    for number in range(12):
        folder = run.directory / "sae" / add_sae(run, f"{number:04d}-s0", 0.9, 2.0, k=2)
        (folder / "history.jsonl").write_text('{"epoch": 1, "ev": 0.5}\n')
    assert "2 in use of 14" in section(run)


def test_an_unstable_mode_is_marked_wherever_it_is_shown(make_run: Any) -> None:
    run = make_run()
    path = run.directory / "modes" / "modes.parquet"
    table = pq.read_table(path)
    stability = pa.array([0.3 if mode == 2 else 0.9 for mode in table["mode"].to_pylist()], pa.float64())
    pq.write_table(table.set_column(table.schema.get_field_index("stability"), "stability", stability), path)
    text = build_report(run.directory, run.config).read_text(encoding="utf-8")
    cards = re.findall(r'<article class="mode card">.*?</article>', text, re.DOTALL)
    marked = {re.search(r"<h3>(Mode \d)</h3>", card)[1]: ">unstable</span>" in card for card in cards}
    assert marked == {"Mode 2": True, "Mode 0": False}
    assert len(re.findall(r"<td>2 \(unstable\)</td>", text)) == 6  # the best mode of class two, for each dictionary
    lenient = run.config.model_copy(update={"modes": run.config.modes.model_copy(update={"unstable_below": 0.2})})
    assert ">unstable<" not in build_report(run.directory, lenient).read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["[", '{"saes": [1]}', '{"choices": [{}]}', "[]"])
def test_a_damaged_selection_is_named(make_run: Any, content: str) -> None:
    run = make_run()
    (run.directory / "sae/selection.json").write_text(content)
    with pytest.raises(ReportError, match=r"selection\.json"):
        build_report(run.directory, run.config)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium was found: install it to test the page in it")
def test_page_of_a_sweep_opens_without_complaint_and_fits_a_narrow_window(sweep: Any, tmp_path: Path) -> None:
    page = build_report(sweep.directory, sweep.config)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    probe = "document.title = String(document.documentElement.scrollWidth - document.documentElement.clientWidth)"
    page.write_text(text.replace("</body>", f"<script>{probe}</script></body>"))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--window-size=500,900", f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert re.findall(r":CONSOLE.*?\] (.*)", done.stderr) == []
    assert "<title>0</title>" in done.stdout
