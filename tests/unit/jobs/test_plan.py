"""`python -m jobs.plan`: a plan as JSON or tables, before anything starts."""

import json

from jobs import plan as job
from latentray.config import compose

TINY = [
    "experiment=shapes_diffusion", "tracking=none", "gpu=h100", "gpus=2", "size=64", "denoiser.channels=[32,32]",
    "denoiser.head_dim=16", "denoiser.depth=[0,0]",
]  # fmt: skip


def run(monkeypatch, capsys, *overrides):
    monkeypatch.setattr("sys.argv", ["plan", *overrides])
    code = job.main()
    return code, capsys.readouterr()


def test_json_is_all_that_is_printed(monkeypatch, capsys, tmp_path):
    code, said = run(monkeypatch, capsys, *TINY, "json=true", "price_per_gpu_hour=4", f"out={tmp_path}/p")
    assert code == 0
    told = json.loads(said.out)
    assert told["gpus"] == 2 and told["price_per_gpu_hour"] == 4
    assert told["total_samples"] == 36000
    assert json.loads((tmp_path / "p" / "plan.json").read_text()) == told
    assert (tmp_path / "p" / "plan.png").exists()


def test_tables_end_with_where_the_plan_lies(monkeypatch, capsys, tmp_path):
    code, said = run(monkeypatch, capsys, *TINY, f"out={tmp_path}")
    assert code == 0
    assert "ZeRO 1 *" in said.out and "largest micro-batch" in said.out
    assert "plan.json" in said.out.replace("\n", "")


def test_mistakes_are_one_message(monkeypatch, capsys):
    for override, says in (
        ("gpu=h1000", "h100, h200"),
        ("text_token=8", "Did you mean 'text_tokens'?"),
        ("measured=/none", "not there"),
    ):
        code, said = run(monkeypatch, capsys, *TINY, override)
        assert code == 2 and says in said.err and "Traceback" not in said.err


def test_its_help_says_how_to_run_it(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "--help")
    assert code == 0
    shown = " ".join(said.out.split())
    assert "gpu_hours_between_failures" in shown and "global_batch_size" in shown
    assert compose.conf_dir().joinpath("plan.yaml").exists()
