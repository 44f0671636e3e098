"""The report renders whole, partial and hostile evidence; the HTML loads nothing from outside."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from triptych.core.errors import InputRefused, StorageError
from triptych.report import blocks, document, figures, gather, html, markdown, write_report
from triptych.report import evidence as ev
from triptych.report.verdict import verdict

# How a page would load something from outside: tags with an address, style sheets, scripts.
LOADS = (
    (r"<(?:script|link|img|iframe|source|video|image|use)\b[^>]*?(?:src|href)\s*=\s*[\"']?(?:https?:)?//", re.I),
    (r"@import|url\(\s*[\"']?(?:https?:)?//|\bfetch\(|XMLHttpRequest", 0),
)
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Balance(HTMLParser):
    """Collects tags, ids and unbalanced ends."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"unbalanced </{tag}>"
        self.open.pop()


def rendered(evidence: ev.Evidence) -> tuple[str, str]:
    """(HTML, Markdown) of the evidence."""
    outcome = verdict(evidence)
    sections = document.sections(evidence, outcome)
    return html.render(evidence, outcome, sections), markdown.render(evidence, outcome, sections)


def parsed(page: str) -> Balance:
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    return balance


def outside_loads(page: str) -> list[str]:
    return [hit for pattern, flags in LOADS for hit in re.findall(pattern, page, flags)]


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Empty figures, for tests that look at the text."""
    monkeypatch.setattr(figures, "svg", lambda draw, canvas, prefix: "<svg></svg>")


@pytest.fixture(scope="module")
def page(evidence) -> str:
    return rendered(evidence)[0]


def test_writes_every_file_and_returns_the_verdict(evidence, tmp_path):
    outcome = write_report(evidence, tmp_path / "out")
    assert outcome.word == "PASS"
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    text = (tmp_path / "out" / "report.md").read_text()
    images = set(re.findall(r"\]\((figures/[^)]+\.png)\)", text))
    assert written == {"report.md", "report.html", "evidence.json"} | images
    assert {image.split("-")[0] for image in images} == {
        "figures/ladder",
        "figures/free",
        "figures/losses.png",
        "figures/differences",
        "figures/faults",
    }
    assert all((tmp_path / "out" / image).read_bytes().startswith(b"\x89PNG") for image in images)
    assert gather.read(tmp_path / "out" / "evidence.json") == evidence


def test_a_directory_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        write_report(ev.Evidence(), tmp_path / "file")


def test_html_is_well_formed_offline_and_free_of_scripts(page):
    balance = parsed(page)
    assert outside_loads(page) == []
    assert not {"script", "iframe", "img", "object", "embed"} & set(balance.tags)
    assert len(balance.ids) == len(set(balance.ids))
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_references_inside_figures_resolve(page):
    ids = set(parsed(page).ids)
    references = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert references
    assert references <= ids


def test_figures_take_their_colors_and_fonts_from_the_page(page):
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert re.findall(r"#[0-9a-fA-F]{6}\b", drawn) == []
    assert "font-family" not in drawn
    assert "<style" not in drawn
    style = page[page.index("<style>") : page.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    for ink, value in figures.INKS.items():
        assert f"--{ink}: {value}" in light
        assert f"--{ink}:" in dark


def test_every_figure_and_number_names_its_command(page, evidence):
    outcome = verdict(evidence)
    for section in document.sections(evidence, outcome):
        for block in section.blocks:
            if isinstance(block, blocks.Picture):
                assert block.command
                assert block.alt.count(" ") > 5
            if isinstance(block, blocks.Table) and block.caption not in ("What makes each part",) and not block.cards:
                assert block.command, block.caption
    assert all(claim.command for claim in outcome.claims)
    assert page.count("made by") >= 10


def test_no_nan_and_no_none_reach_the_reader(evidence, page, undrawn):
    for text in (page, rendered(evidence)[1]):
        assert not re.search(r"(?<![a-z])(nan|inf|None)(?![a-z])", re.sub(r"default-src 'none'|fill: none|: none|none set", "", text))


def test_headline_comes_first_and_is_computed(evidence, undrawn):
    page, text = rendered(evidence)
    assert text.startswith("# Three frameworks, one model: PASS\n")
    assert 'Three frameworks, one model: <em class="pass">PASS</em>' in page


@pytest.mark.parametrize("part", ["certificates", "training", "short_training", "faults", "costs", "code", "environment", "commands"])
def test_a_missing_part_says_why(evidence, part, undrawn):
    empty = {} if part in ("environment", "commands") else None if "training" in part else ()
    partial = dataclasses.replace(evidence, **{part: empty}, missing={part: "the disk was <full>"})
    page, text = rendered(partial)
    assert "the disk was &lt;full&gt;" in page
    assert "the disk was &lt;full&gt;" in text
    parsed(page)
    expected = "INCOMPLETE" if part in ("certificates", "training", "short_training", "faults") else "PASS"
    assert verdict(partial).word == expected


def test_nothing_at_all_still_renders():
    page, text = rendered(ev.Evidence())
    parsed(page)
    assert "INCOMPLETE" in page
    assert "this run did not produce it" in text
    assert outside_loads(page) == []


def test_hostile_strings_stay_text(hostile, tmp_path):
    write_report(hostile, tmp_path)
    page, text = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    parsed(page)
    assert outside_loads(page) == []
    assert outside_loads(text) == []
    assert "<script" not in page
    assert "<script" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert {path.parent.name for path in tmp_path.rglob("*.png")} == {"figures"}


def test_hostile_names_cannot_make_markdown_links(hostile, undrawn):
    _, text = rendered(hostile)
    links = re.findall(r"(?<!\\)\]\(([^)]*)\)", re.sub(r"`[^`]*`", "", text))
    assert all(link.startswith("figures/") for link in links)


def test_svg_is_well_formed_xml(evidence):
    drawing = figures.svg(partial(figures.ladder, evidence.certificates[0]), figures.NARROW, "x")
    root = ElementTree.fromstring(drawing)
    assert root.tag == "svg"
    assert "exact" in "".join(root.itertext())


def test_svg_is_deterministic(evidence):
    draw = partial(figures.fault_map, evidence.faults[0])
    assert figures.svg(draw, figures.WIDE, "x") == figures.svg(draw, figures.WIDE, "x")


def test_figures_leave_matplotlib_as_it_was(evidence):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figures.png(partial(figures.losses, evidence.training))
    assert dict(mpl.rcParams) == before


def test_a_rung_without_evidence_is_drawn_as_such(evidence, monkeypatch):
    rungs = tuple(dataclasses.replace(rung, worst_error=None, passed=False) for rung in evidence.certificates[0].rungs)
    certificate = dataclasses.replace(evidence.certificates[0], rungs=rungs, verdict="fail")
    assert "no evidence" in figures.svg(partial(figures.ladder, certificate), figures.WIDE, "x")
    monkeypatch.setattr(figures, "svg", lambda draw, canvas, prefix: "")
    for text in rendered(dataclasses.replace(evidence, certificates=(certificate,))):
        assert "no evidence" in text
        assert "FAIL" in text


def test_a_rung_that_does_not_apply_is_told_and_not_taken_for_one_left_out(evidence, monkeypatch):
    monkeypatch.setattr(figures, "svg", lambda draw, canvas, prefix: "")
    whole = evidence.certificates[0]
    idle = ({"number": 2, "name": "preprocessing", "reason": "it takes features"},)
    rungs = tuple(rung for rung in whole.rungs if rung.number != 2)
    for told, left_out in ((idle, False), ((), True)):
        certificate = dataclasses.replace(whole, rungs=rungs, not_applicable=told)
        made = dataclasses.replace(evidence, certificates=(certificate,))
        assert ev.from_dict(json.loads(json.dumps(ev.to_dict(made)))) == made
        text = rendered(made)[1]
        assert ("Rung 2, preprocessing, does not apply: it takes features." in text) != left_out
        assert ("rung 2 does not apply" in text) != left_out
        assert ("were left out here" in text) == left_out


def test_newer_writers_may_add_keys_and_a_missing_one_is_named(evidence):
    data = json.loads(json.dumps(ev.to_dict(evidence)))
    data["certificates"][0]["rungs"][0]["invented"] = 1
    assert ev.from_dict(data) == evidence
    del data["certificates"][0]["verdict"]
    with pytest.raises(InputRefused, match="Certificate lacks verdict"):
        ev.from_dict(data)
    with pytest.raises(InputRefused, match="schema 99"):
        ev.from_dict({"schema": 99})


@pytest.mark.parametrize(
    ("correct", "said"), [([], "one number a seed"), ([899, 1], "899, 1. of 898"), (886, "Run.correct is 886"), ([886], "1, 3, 3 seeds")]
)
def test_a_training_without_a_sound_number_of_images_for_every_seed_is_refused(evidence, correct, said):
    data = json.loads(json.dumps(ev.to_dict(evidence)))
    data["training"]["runs"][0]["correct"] = correct
    with pytest.raises(InputRefused, match=said):
        ev.from_dict(data)


def test_evidence_that_is_not_json_is_refused_by_name(tmp_path: Path):
    (tmp_path / "evidence.json").write_text("[1")
    with pytest.raises(InputRefused, match=r"evidence\.json"):
        gather.read(tmp_path / "evidence.json")


def test_a_certificate_is_read_from_the_json_of_the_ladder(evidence):
    certificate = evidence.certificates[0]
    assert certificate.rungs[2].pair == "pytorch / tensorflow"
    assert certificate.curves[0].counted == (0, 1, 2, 3, 4)
    assert certificate.context is not None
    assert (certificate.context.published, certificate.context.layout_noise) == (2.68e-7, {"pytorch": 4.5e-7})
    with pytest.raises(InputRefused, match="Certificate lacks verdict"):
        gather.certificate({"rungs": []})


def test_causes_that_cannot_be_shown_keep_their_row(evidence):
    assert [(row.name, row.numerics) for row in evidence.faults[0].not_expressible] == [("numerics 9", 9), ("dropout_in_eval", None)]
