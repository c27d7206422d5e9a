"""The page: whole, self-contained, and showing the numbers of its metrics."""

from __future__ import annotations

import base64
import io
import itertools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from tests.report import rows

from prism import video as media
from prism.commands import show
from prism.errors import PrismError
from prism.report import figures, metrics, page, tables, wording

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Balanced(HTMLParser):
    """Collects texts and links, and checks that every element is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.links, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(path):
    parser = Balanced()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser, re.sub(r"[ \n]+", " ", " ".join(parser.texts))


def video(shade):
    frames = np.zeros((17, 8, 10, 3), dtype=np.uint8)
    frames[..., 0] = shade
    frames[..., 1] = np.arange(17).reshape(-1, 1, 1)
    return frames


@pytest.fixture
def document():
    return metrics.document("demo", {"name": "tiny"}, 0, rows.accuracy(), rows.picks(), {"train": 1.5})


def test_the_page_is_whole_and_needs_no_network(document, tmp_path):
    strip = page.FilmStrip("<b>prompt</b>", [page.FilmRow("winner", video(9), "seed 3", True)], "caption & more")
    page.write_report(
        tmp_path / "r.html", document, [strip], "A title", ["What it shows."], {"steps": 5, "a": {"b": 1}}
    )
    parser, text = read(tmp_path / "r.html")
    source = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(link.startswith(("data:", "#")) for link in parser.links)
    assert "script" not in parser.tags
    outside = re.findall(r"""(?:url\(|@import)\s*['"]?(?!#)[^)'"]*""", source)
    assert outside == []
    assert "<b>prompt</b>" not in source  # text is escaped
    assert parser.tags.count("svg") == 2
    for needle in (
        "A title",
        "What it shows.",
        "caption & more",
        "seed 3",
        "a.b",
        "74.0\u00a0%",
        "+0.83",
        "19\u202f200",
    ):
        assert needle in text, needle
    ids = re.findall(r'\bid="([^"]+)"', source)
    assert len(ids) == len(set(ids))


def test_headlines_are_the_measured_numbers(document):
    cards = {card["name"]: card for card in page.headlines(document)}
    assert cards["Judge accuracy"]["value"] == "74.0\u00a0%"
    assert "t\u00a0=\u00a0699" in cards["Judge accuracy"]["text"]
    assert cards["Gain"]["value"] == "+0.62"  # of early, as fixed beforehand, though draft gained more here
    assert "early" in cards["Gain"]["text"]
    assert cards["Cost"]["value"] == "33\u00a0%"
    assert cards["Decodes"]["value"] == "1"


def test_a_page_without_rows_has_no_plots(tmp_path):
    page.write_report(tmp_path / "r.html", metrics.document("train", {}, 0))
    parser, text = read(tmp_path / "r.html")
    assert "svg" not in parser.tags
    assert "Ledger" not in text


def test_unmeasured_gains_leave_out_their_columns(tmp_path):
    document = metrics.document(
        "sample", {}, 0, best_of_n=[rows.pick("early", None, 0.3, schedule=[[5, 1]], prompts=1)]
    )
    page.write_report(tmp_path / "r.html", document)
    _, text = read(tmp_path / "r.html")
    assert "oracle’s gain" not in text
    assert "30.0\u00a0%" in text


def test_metrics_that_break_the_schema_give_no_page(document, tmp_path):
    del document["accuracy"][0]["t"]
    with pytest.raises(PrismError, match="'t' is missing"):
        page.write_report(tmp_path / "r.html", document)
    assert not (tmp_path / "r.html").exists()


def test_film_takes_first_to_last_frame_at_full_size():
    strip = page.film(video(200), count=5, gap=2)
    assert strip.shape == (8, 5 * 10 + 4 * 2, 4)
    lefts = [i * 12 for i in range(5)]
    assert [int(strip[0, left, 1]) for left in lefts] == [0, 4, 8, 12, 16]
    assert [int(strip[0, left + 9, 3]) for left in lefts] == [255] * 5
    assert int(strip[0, 10, 3]) == 0
    assert np.array_equal(page.film(video(200)[:3] / 255.0, count=9), page.film(video(200)[:3], count=9))
    picture = np.asarray(Image.open(io.BytesIO(page.png(strip))))
    assert np.array_equal(picture, strip)


def test_the_embedded_picture_is_the_film(document, tmp_path):
    strip = page.FilmStrip("p", [page.FilmRow("winner", video(9))])
    page.write_report(tmp_path / "r.html", document, [strip])
    parser, _ = read(tmp_path / "r.html")
    (uri,) = [link for link in parser.links if link.startswith("data:image/png")]
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
    assert np.array_equal(np.asarray(picture), page.film(video(9)))


@pytest.mark.parametrize("plot", [figures.accuracy_plot(rows.accuracy()), figures.cost_plot(rows.picks())])
def test_plots_are_svg_in_the_colours_of_the_page(plot):
    root = ElementTree.fromstring(plot.replace("xlink:href", "href"))
    assert root.tag == "svg"
    assert root.attrib["role"] == "img"
    colours = set(re.findall(r"#[0-9a-fA-F]{6}\b", plot))
    assert colours <= {"#ffffff", "#000000"}, colours
    assert "var(--accent)" in plot


def test_plots_name_their_lines_and_points():
    names = set(re.findall(r">([^<>]+)</text>", figures.cost_plot(rows.picks())))
    assert {"none", "random", "early", "draft", "full", "oracle"} <= names
    names = set(re.findall(r">([^<>]+)</text>", figures.accuracy_plot(rows.accuracy())))
    assert {"overall", "VQ", "chance"} <= names
    two = rows.accuracy() + rows.accuracy(judge="pixel")
    names = set(re.findall(r">([^<>]+)</text>", figures.accuracy_plot(two)))
    assert {"prism", "pixel"} <= names
    seeds = rows.accuracy() + rows.accuracy(head_seed=1)
    names = set(re.findall(r">([^<>]+)</text>", figures.accuracy_plot(seeds)))
    assert {"prism, seed 0", "prism, seed 1"} <= names


def test_plots_are_the_same_in_every_run():
    assert figures.cost_plot(rows.picks()) == figures.cost_plot(rows.picks())


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [0.1, 0.9, 0.12], [1.0, 1.0], [0.5], []])
def test_labels_keep_their_distance_and_order(values):
    placed = figures._spread(values, gap=0.2, low=0.0, high=1.0)
    order = sorted(range(len(values)), key=values.__getitem__)
    heights = [placed[i] for i in order]
    assert all(b - a > 0.2 - 1e-9 for a, b in itertools.pairwise(heights))
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in heights)


def test_levels_are_grouped_by_judge_noisiest_first():
    groups = wording.by_level(rows.accuracy(judge="b")[::-1] + rows.accuracy(judge="a"))
    levels = [(group["overall"]["judge"], group["overall"]["t"]) for group in groups]
    assert levels == [("b", t) for t in rows.LEVELS] + [("a", t) for t in rows.LEVELS]


def printed(table, width=80):
    from rich.console import Console

    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_terminal_tables_fit_80_columns_uncut():
    text = printed(tables.best_of_n_table(rows.picks()))
    assert "…" not in text.replace(" … ", "").replace("\u00a0…\u00a0", "")
    lines = [line for line in text.splitlines() if line.startswith(("early", " early"))]
    assert len(lines) == 1
    assert "+0.62" in lines[0]
    assert "33.0" in lines[0]
    text = printed(tables.accuracy_table(rows.accuracy()))
    assert re.search(r"699 +74\.0\u00a0% +70\.0\u00a0…\u00a079\.0 +871 +71\.0\u00a0% +65\.0\u00a0% +1203", text)


def test_strategies_with_several_settings_are_curves():
    others = [
        rows.pick("early", gain, share, schedule=[[step, 1]], name=f"early {step}:1")
        for step, gain, share in ((2, 0.3, 0.18), (6, 0.9, 0.4))
    ]
    others += [rows.pick("early", 0.7, 0.2, schedule=[[2, 4], [4, 1]], name="early 2:4,4:1")]
    plain, curves = figures.cost_plot(rows.picks()), figures.cost_plot(rows.picks() + others)
    texts = re.findall(r">([^<>]+)</text>", curves)
    assert {"2", "6"} <= set(texts)
    assert texts.count("early") == 1  # the one that was fixed beforehand bears the name
    # the right edge tells shares of the oracle's gain
    assert {"100 %", "50 %", "share of the oracle’s gain"} <= set(re.findall(r">([^<>]+)</text>", plain))


def test_the_page_shows_judges_side_by_side_bars_and_looks(tmp_path):
    seeds = {"head_seed": None, "head_seeds": [0, 1, 2]}
    accuracy = rows.accuracy(**seeds) + [row for seed in range(3) for row in rows.accuracy(head_seed=seed)]
    accuracy += rows.accuracy(judge="pixel") + rows.accuracy(judge="pixel", set="unseen")
    picks = [rows.pick("early", 0.6, 0.3, schedule=[[4, 1]], **seeds)]
    picks += [
        rows.pick("early", 0.6 + seed / 10, 0.3, schedule=[[4, 1]], head_seed=seed, oracle_share=0.4 + seed / 10)
        for seed in range(3)
    ]
    picks += [rows.pick("early", 0.2, 0.3, schedule=[[4, 1]], set="unseen", prompts=40)]
    common = {"judge": "prism", "against": "pixel", "set": "test", "pairs": 1100, "prompts": 60}
    comparison = [
        {**common, "t": t, "dimension": dimension, "difference": gap, "ci95": [gap - 0.02, gap + 0.02]}
        for t, gap in ((299, 0.01), (899, 0.05))
        for dimension in ("VQ", "overall")
    ]
    look = {"t": 699.0, "candidates": "best", "referee": 0.9, "attention_share": 0.4, "area_share": 0.25}
    look |= {"video_share": 0.8, "lift": 1.6, "lift_ci95": [1.4, 1.8], "prompts": 20}
    document = metrics.document(
        *("demo", {"name": "tiny"}, 0, accuracy, picks),
        judge_comparison=comparison,
        bars=[{"bar": "at least half", "reached": "46 %", "met": False}],
        agreement={"prompts": 3, "runs": 45, "same_pick": 45, "largest_difference": 2e-7},
        attention=[look],
    )
    strip = page.FilmStrip("a red circle grows", [page.FilmRow("where the query looks", video(9), "40% on 25%")])
    page.write_report(tmp_path / "r.html", document, looks=[strip])
    _, text = read(tmp_path / "r.html")
    for needle in (
        "prism, 3 seeds",
        "+5.0",
        "+3.0\u00a0…\u00a0+7.0",
        "at least half 46 % no",
        "40 unseen combinations",
    ):
        assert needle in text, needle
    for needle in (
        "45 of 45 runs",
        "1.40\u00a0…\u00a01.80",
        "where the query looks 40% on 25%",
        "early, seed 2: 60",
    ):
        assert needle in text, needle
    assert "where the query looks 40% on 25%" in text
    assert text.index("+5.0") < text.index("+1.0")  # the noisiest level first
    assert "prism, seed 1" not in text  # seeds are pooled in the tables
    names = set(re.findall(r">([^<>]+)</text>", figures.accuracy_plot(wording.pooled(rows.accuracy(**seeds)))))
    assert "overall" in names


def test_what_rounds_to_nothing_has_no_minus():
    written = [(w(-0.0004), w(-0.0061)) for w in (wording.signed, wording.percent, wording.points)]
    assert written == [("+0.00", "−0.01"), ("0.0\u00a0%", "−0.6\u00a0%"), ("+0.0", "−0.6")]


def test_judges_stand_side_by_side_on_the_terminal():
    found = rows.accuracy() + [row for row in rows.accuracy(judge="pixel") if row["t"] in (899, 0)]
    text = printed(tables.judges_table(found))
    assert max(len(line) for line in text.splitlines()) <= 80
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("899")]
    assert line.split(" " * 2)[0].strip() == "899"
    assert line.count("64.0\u00a0%") == line.count("60\u00a0…\u00a069") == 2
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("699")]
    assert line.rstrip().endswith("–")


def test_videos_play_in_the_page(document, tmp_path):
    clips = [page.FilmRow("The pick", video(200), "referee 0.96", True), page.FilmRow("The worst", video(9))]
    page.write_report(tmp_path / "r.html", document, [page.FilmStrip("p", caption="c", clips=clips, fps=4)])
    source = (tmp_path / "r.html").read_text(encoding="utf-8")
    players = re.findall(r"<video [^>]*>", source)
    assert len(players) == 2
    assert all(re.search(r"\bloop muted controls playsinline>$", player) for player in players)
    data = re.search(r'src="data:video/mp4;base64,([^"]+)"', players[0])
    (tmp_path / "clip.mp4").write_bytes(base64.b64decode(data.group(1)))
    assert np.abs(media.read_video(tmp_path / "clip.mp4") * 255 - video(200)).mean() < 6
    assert sum(link.startswith("data:video/mp4") for link in read(tmp_path / "r.html")[0].links) == 2


def test_a_large_video_becomes_a_small_clip(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (9, 90, 160, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    (tmp_path / "clip.mp4").write_bytes(page.clip(frames, 8))
    assert media.read_video(tmp_path / "clip.mp4").shape == (9, 240, 426, 3)


def test_the_ledger_has_gain_and_cost_beside_the_name_and_how_at_the_end(document, tmp_path):
    """On a phone each row becomes a block whose cells name themselves; in print nothing is cut off."""
    page.write_report(tmp_path / "r.html", document)
    source = (tmp_path / "r.html").read_text(encoding="utf-8")
    (row,) = re.findall(r"<tr[^>]*><th class=\"left\">early</th>.*?</tr>", source)
    names = re.findall(r'data-name="([^"]+)"', row)
    assert names[:3] == ["gain", "95 % interval", "rows, of full"]
    assert row.endswith('<td class="left soft how">step 5 keeps 1</td></tr>')
    style = source[source.index("<style>") : source.index("</style>")]
    phone, printed_style = style[style.index("@media (max-width: 620px)") :].split("@media print")
    assert "content: attr(data-name)" in phone
    assert ".panel { overflow: visible; }" in printed_style


def test_the_main_dimension_is_named_where_a_judge_has_no_overall(tmp_path):
    """A judge of VQ and MQ has no column that is called overall."""
    found = rows.accuracy(dimension="VQ")[:5] + rows.accuracy(dimension="MQ")[5:]
    text = printed(tables.accuracy_table(found))
    assert "overall" not in text
    assert re.search(r"t +VQ ", text)
    assert "overall" not in printed(tables.judges_table(found + [row | {"judge": "pixel"} for row in found]))
    page.write_report(tmp_path / "r.html", metrics.document("eval", {}, 0, found))
    text = read(tmp_path / "r.html")[1]
    assert "overall" not in text
    assert "71.0\u00a0%" in text


def test_no_interval_is_a_dash():
    found = rows.accuracy(without_ties_ci95=None)
    assert re.search(r"699 +74\.0\u00a0% +– +871", printed(tables.accuracy_table(found)))


def test_a_table_of_many_strategies_fits_80_columns_a_line_each():
    extreme = {"referee_gain_ci95": [-0.61, -0.02], "oracle_share": -0.31, "denoiser_rows": 68_000.0}
    many = [rows.pick("early", -0.3, 0.274, schedule=[[3, 4], [6, 1]], name="early 3:4,6:1", **extreme)]
    many += [rows.pick("draft", 0.2, 1.0, draft_steps=3, judge_at=700, name=f"draft {n}", **extreme) for n in (3, 4)]
    lines = printed(tables.best_of_n_table(many)).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert sum(line.lstrip().startswith(("early 3:4,6:1 ", "draft 3 ", "draft 4 ")) for line in lines) == 3
    assert sum("−0.61\u00a0…\u00a0−0.02" in line for line in lines) == 3


def test_what_lies_between_levels_that_were_not_measured_is_dashed():
    whole, some = rows.accuracy(), [row for row in rows.accuracy(judge="pixel") if row["t"] in (899, 699, 0)]
    dashed = figures.accuracy_plot(whole + some).count("stroke-dasharray")
    assert dashed == figures.accuracy_plot(whole + rows.accuracy(judge="pixel")).count("stroke-dasharray") + 1


def test_labels_of_points_keep_off_points_and_each_other():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9, 3.5))
    axes = figure.add_subplot()
    points = [(12.0, 0.05), (12.0, 0.02), (26.0, 0.4), (32.0, 0.3), (100.0, 0.6)]
    for x, y in points:
        axes.plot(x, y, "o")
        axes.plot([x, x], [y - 0.1, y + 0.1])
    axes.set_xlim(0, 105)
    names = ("a", "bb", "ccc", "dd", "e")
    named = [figures.Label(x, y, name, "#000000", 10, False) for (x, y), name in zip(points, names)]
    figures.place_labels(figure, axes, named)
    boxes = [text.get_window_extent() for text in axes.texts]
    spots = [axes.transData.transform(point) for point in points]
    assert not any(box.contains(*spot) for box in boxes for spot in spots)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_the_page_and_the_terminal_show_an_evaluation(tmp_path, capsys):
    document = metrics.document("eval", {"name": "tiny"}, 0, rows.accuracy(), **rows.evaluation())
    page.write_report(tmp_path / "r.html", document)
    _, text = read(tmp_path / "r.html")
    show(document, tmp_path)
    told = " ".join(capsys.readouterr().out.split())
    for needle in (
        "Accuracy of runs/a over runs/b",
        "+3.1",
        "0.664",
        "Per pair of generators, overall at t = 699",
        "sora / wan",
        "Probabilities of better, tie and worse, overall",
        "4.1\u00a0%",
        "Bias probes, overall at t = 699",
        "brighter",
        "+9.0",
        "32 pairs scored as (A, B) and as (B, A) have exactly opposite margins",
    ):
        assert needle in text, needle
        assert needle.replace("\u00a0", " ") in told, needle
    assert "Against judges that look at pixels" not in text
