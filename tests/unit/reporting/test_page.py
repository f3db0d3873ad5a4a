"""The page: self-contained, honest about what is missing, and its lineage graph without implied arrows."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from latentray.reporting import lineage
from latentray.reporting.page import number_at, quickstart_page

LINEAGE = [
    {"role": "dataset", "kind": "dataset", "uri": "d", "digest": "sha256:d0", "inputs": {}},
    {
        "role": "autoencoder",
        "kind": "autoencoder",
        "uri": "a",
        "digest": "sha256:a1",
        "inputs": {"dataset": "sha256:d0"},
    },
    {
        "role": "latents",
        "kind": "latents",
        "uri": "l",
        "digest": "sha256:b2",
        "inputs": {"dataset": "sha256:d0", "autoencoder": "sha256:a1", "other": "sha256:unknown"},
    },
    {"role": "model", "kind": "model", "uri": "m", "digest": "sha256:c3", "inputs": {"latents": "sha256:b2"}},
]
REPORT = {
    "autoencoder": {"psnr": 25.83},
    "samples": {
        "color_accuracy": 0.8999,
        "background_accuracy": 1.0,
        "shape_accuracy": float("nan"),
        "heldout": ["a red circle on a black background"],
    },
    "release": {"id": "r1"},
    "lineage": LINEAGE,
    "timings": {"build_shards": 6.0, "train": 54.0, "evaluate": None},
    "total_seconds": 90.0,
    "targets": {"autoencoder": {"psnr": 24}, "samples.color_accuracy": 0.9, "samples": {"shape_accuracy": 0.75}},
    "commands": ["make <one>", {"title": "Serve", "command": "python -m jobs.serve"}],
    "machine": {"cores": 2},
    "notes": ["<script>alert(1)</script>"],
    "config": {"seed": 0, "stage": {"name": "x"}},
}


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.loads, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]


def _page(report, pictures=None, curves=None):
    html = quickstart_page(report, pictures or {}, curves or {})
    parsed = _Links()
    parsed.feed(html)
    return html, parsed


def test_nothing_is_loaded_and_nothing_from_the_report_becomes_markup():
    red = Image.new("RGB", (8, 8), "red")
    captions = {f"sample:a {c} circle on a {b} background": red for c in ("red", "blue") for b in ("white", "black")}
    html, parsed = _page(REPORT, {"reconstructions": red, "sample:a cat": red, **captions}, {"Loss": "<svg/>"})
    assert parsed.loads
    assert all(link.startswith("data:image/") for link in parsed.loads)
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert "url(" not in html
    assert "@import" not in html
    assert "make &lt;one&gt;" in html
    assert html.count('class="unseen"') == 1
    assert 'title="a red circle on a black background (unseen in training)"' in html
    assert "a cat" in html


def test_cards_judge_against_targets_and_never_round_a_miss_into_a_pass():
    html, _ = _page(REPORT)
    cards = dict(re.findall(r'<div class="label">(.*?)</div>.*?<span class="pill \w+">(.*?)</span>', html, re.S))
    assert cards["Reconstruction, PSNR"] == "✓ met"
    assert cards["Colour right"] == "✗ missed"
    assert "89.9 %" in html
    assert cards["Background right"] == "no target"
    assert cards["Shape right"] == "not measured"
    assert "1 of 2 targets met" in html
    assert "1 min 30 s" in html


@pytest.mark.parametrize("key", sorted(REPORT))
@pytest.mark.parametrize("value", ["missing", None])
def test_a_page_comes_out_whatever_is_missing(key, value):
    report = {k: v for k, v in REPORT.items() if k != key} | ({key: None} if value is None else {})
    assert "</html>" in _page(report)[0]


def test_an_empty_report_says_not_measured():
    html, _ = _page({})
    assert html.count("not measured") >= 6
    assert "No release was made" in html


def test_time_outside_the_stages_is_shown():
    html, _ = _page(REPORT)
    assert "between the stages" in html
    assert "left:66.67%;width:33.33%" in html


def test_numbers_only():
    assert number_at({"a": {"b": True}}, "a.b") is None
    assert number_at({"a.b": 2}, "a.b") == 2.0
    assert number_at({"a": 3}, "a.b") is None


def test_the_graph_leaves_out_arrows_that_a_longer_way_implies():
    graph = lineage.nodes(LINEAGE)
    assert [node.layer for node in graph] == [0, 1, 2, 3]
    assert graph[2].parents == (1,)  # the data set's arrow goes through the autoencoder
    for vertical in (False, True):
        svg = lineage.svg(graph, vertical=vertical)
        assert svg.count('class="edge"') == 3
        assert "sha256:a1" in svg


def test_a_cycle_or_a_missing_digest_does_not_hang_the_graph():
    loop = [
        {"role": "a", "digest": "1", "inputs": {"x": "2"}},
        {"role": "b", "digest": "2", "inputs": {"x": "1"}},
        {"role": "c"},
    ]
    graph = lineage.nodes(loop)
    assert len(graph) == 3
    assert graph[2].short == "no digest"
    assert lineage.svg(graph, vertical=False)
