"""A run's page: self-contained, the same from half of the facts, and its bar of time adds up."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from latentray.tracking import names
from latentray.training import run_page

RECORDS = [
    {
        "samples": 96 * step,
        "time": 1000.0 + step,
        names.TRAIN_LOSS: 1 / step,
        names.TRAIN_SAMPLES_PER_SECOND: 96.0,
        names.TRAIN_DATA_WAIT_SHARE: 0.05,
        names.TRAIN_PEAK_MEMORY_BYTES: 3 * 2**30,
        names.TRAIN_DROPPED_STEPS: step // 8,
        names.RUN_RESTARTS: step // 6,
        names.RUN_GOODPUT: 0.75,
        names.lost_to("faults"): 0.2,
        names.lost_to("other"): 0.05,
    }
    for step in range(1, 11)
]
ABOUT = {
    "run": "diffusion-<1>",
    "stage": "diffusion",
    "state": "stopped",
    "total_samples": 4800,
    "result": "runs/a/model",
    "lineage": [
        {"role": "latents", "kind": "latents", "digest": "sha256:aa", "inputs": {}},
        {"role": "model", "kind": "model", "digest": "sha256:bb", "inputs": {"latents": "sha256:aa"}},
    ],
    "figures": {"psnr": 25.5},
    "plan": [{"name": "peak_memory_bytes", "planned": 4 * 2**30, "actual": 3 * 2**30}],
    "commands": [{"title": "", "command": "python -m jobs.train run='<a>'"}],
    "machine": {"workers": 2},
    "notes": ["<script>alert(1)</script>"],
    "config": {"seed": 0, "stage": {"name": "diffusion"}},
}
PICTURES = {"samples": Image.new("RGB", (4000, 8), "red")}


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.loads, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]


@pytest.fixture(scope="module")
def html():
    return run_page.run_page(RECORDS, ABOUT, PICTURES)


def _cards(html):
    found = re.findall(r'class="label">(.*?)</div><div class="value">(.*?)</div><div class="foot">(.*?)</div>', html)
    return {label: (value, foot) for label, value, foot in found}


def test_nothing_is_loaded_and_nothing_that_a_run_tells_becomes_markup(html):
    parsed = _Links()
    parsed.feed(html)
    assert parsed.loads
    assert all(link.startswith("data:image/") for link in parsed.loads)
    assert not {"script", "link"} & set(parsed.tags)
    assert "url(" not in html
    assert "@import" not in html
    assert "diffusion-&lt;1&gt;" in html


def test_the_cards_say_what_the_lines_say(html):
    cards = _cards(html)
    assert cards["Last loss"] == ("0.1", "lowest 0.1")
    assert cards["Samples per second"][0] == "96"
    assert cards["Goodput"][0] == "75.0 %"
    assert cards["Peak memory"][0] == "3.00 GiB"
    assert cards["Restarts"][0] == "1"
    assert cards["Dropped steps"][0] == "1"
    assert cards["Stalled for checkpoints"] == ("—", "not measured")
    assert "960 of 4,800 samples" in html
    assert "10 s from its first step" in html
    assert "Peak memory of a worker" in html
    assert "75 %" in html


def test_the_bar_of_time_is_full_and_names_each_cause(html):
    widths = [float(width) for width in re.findall(r'<i style="width:([\d.]+)%', html)]
    assert widths == [75.0, 20.0, 5.0]
    assert "restarts, and steps done again<b>20.0 %</b>" in html


@pytest.mark.parametrize("state", [*run_page.STATES, "unheard of"])
def test_the_state_stands_in_the_headline(state):
    html = run_page.run_page([], {"state": state}, {})
    colour = run_page.STATES.get(state, "none")
    assert re.search(rf'<span class="pill {colour}">.*{state}</span>', html)


@pytest.mark.parametrize("key", sorted(ABOUT))
@pytest.mark.parametrize("value", ["missing", None])
def test_a_page_comes_out_whatever_is_missing(key, value):
    about = {k: v for k, v in ABOUT.items() if k != key} | ({key: None} if value is None else {})
    assert "</html>" in run_page.run_page(RECORDS[:1], about, {})


def test_a_run_that_logged_nothing_says_so():
    html = run_page.run_page([], {}, {})
    assert "no step was logged" in html
    assert {foot for _, foot in _cards(html).values()} == {"not measured"}


def test_a_wide_picture_is_made_smaller_and_stays_whole(html):
    assert 'width="1600" alt="Samples"' in html


def test_only_charts_with_values_are_drawn():
    held_out = [
        {"samples": i, names.VALIDATION_LOSS: 1.0, names.VALIDATION_FID: 9.0, names.validation_loss_at(500): 0.5}
        for i in (1, 2)
    ]
    titles = [chart.title for chart in run_page.charts([*RECORDS, *held_out])]
    assert titles == ["Loss", "Throughput", "Held-out loss", "Held-out loss by timestep", "Held-out FID"]
    assert [chart.title for chart in run_page.charts([*RECORDS, held_out[0]])] == ["Loss", "Throughput"]
    assert run_page.charts([{"samples": 1, names.TRAIN_LOSS: "nan"}]) == []


def test_a_long_run_is_drawn_from_fewer_points_and_keeps_its_last():
    records = [{"samples": i, names.TRAIN_LOSS: 1.0} for i in range(100_000)]
    html = run_page.run_page(records, {}, {})
    assert len(html) < 400_000
    assert "99,999 samples" in html


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("bytes", 2**20, "1.0 MiB"),
        ("bytes", 3 * 2**29, "1.50 GiB"),
        ("hours", 1.5, "1 h 30 min"),
        ("loss", 0.00012346, "0.0001235"),
        ("rate", 123456.0, "123,456"),
        ("rate", None, "—"),
    ],
)
def test_quantities_read_well(name, value, shown):
    assert run_page.quantity(name, value) == shown
