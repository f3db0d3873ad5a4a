"""`python -m jobs.plan`: a plan as tables, as JSON, and as a picture of memory by ZeRO stage."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from latentray.checkpoint import store
from latentray.config.plan import PlanConfig
from latentray.planning.memory import Memory
from latentray.planning.plan import Checkpoints, Estimate, Plan, plan
from latentray.reporting import stacked_bars
from latentray.reporting.progress import duration

JSON, PICTURE = "plan.json", "plan.png"
_ROWS = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "average": ("average",),
    "activations": ("activations", "workspace"),
    "other": ("buffers", "frozen", "reserved"),
}
"""Row of the table and colour of the picture -> parts of Memory."""


def run(config: PlanConfig) -> Plan:
    """Plan, print, and write `plan.json` and `plan.png` where `out` is given."""
    made = plan(config)
    if config.json:
        print(json.dumps(made.to_json(), indent=2, sort_keys=True), flush=True)
    else:
        show(made)
    if config.out is not None:
        write(made, config.out)
        if not config.json:
            print(f"Result: {store.join(config.out, JSON)}, {store.join(config.out, PICTURE)}", flush=True)
    return made


def write(made: Plan, out: str) -> None:
    """`plan.json` and `plan.png` into a folder, local or remote."""
    store.write_json(store.join(out, JSON), made.to_json())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PICTURE
        picture(made, path)
        store.upload(path, store.join(out, PICTURE))


def picture(made: Plan, path: Path) -> None:
    """Memory of one worker by ZeRO stage, in GiB, as a PNG."""
    stacked_bars.save(
        {f"ZeRO {one.stage}": grouped(one.memory) for one in made.stages},
        path,
        title=f"{made.gpus} x {made.gpu}, micro-batch {made.micro_batch}",
        y_label="GiB per worker",
        limit=(f"{made.gpu}: usable", made.usable_bytes / 2**30),
    )


def grouped(memory: Memory) -> dict[str, float]:
    """GiB by row of the table."""
    return {name: sum(getattr(memory, part) for part in parts) / 2**30 for name, parts in _ROWS.items()}


def show(made: Plan, console: Console | None = None) -> None:
    """Print the tables."""
    console = console or Console(highlight=False)
    for net in made.networks:
        state = "trained" if net.trained else "frozen"
        console.print(f"{net.name}: {net.parameters:,} parameters, {state}")
    console.print(
        f"{made.gpus} x {made.gpu}, {made.precision}, micro-batch {made.micro_batch} x {made.accumulation}; "
        f"{made.usable_bytes / 2**30:,.1f} of {made.device_bytes / 2**30:,.1f} GiB may be filled",
        soft_wrap=True,
    )
    console.print(_memory_table(made))
    work = sum(made.flops_per_sample.values()) / 1e9
    console.print(f"{made.total_samples:,} samples of {work:,.1f} GFLOP, forward and backward")
    console.print(_time_table(made))
    saved = made.checkpoints
    console.print(
        f"A checkpoint is {_size(saved.bytes)} ({duration(saved.write_s)} to write), those kept "
        f"{_size(saved.kept_bytes)}, the result {_size(saved.result_bytes)}. {how_often(saved)}; "
        f"the least is lost with one each {duration(saved.best_interval_s)}.",
        soft_wrap=True,
    )
    for warning in made.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def how_often(saved: Checkpoints) -> str:
    """How often checkpoints are written, and the share of the time that is lost so."""
    if not saved.kept_bytes:
        return f"None is written (checkpoint_every_samples=0), and failures cost {saved.lost_share:.2%} of the time"
    return f"One each {duration(saved.interval_s)}, of which failures and writing cost {saved.lost_share:.2%}"


def _memory_table(made: Plan) -> Table:
    table = Table()
    table.add_column("GiB per worker")
    for one in made.stages:
        table.add_column(f"ZeRO {one.stage}{' *' if one.stage == made.zero_stage else ''}", justify="right")
    columns = [grouped(one.memory) for one in made.stages]
    for name in _ROWS:
        table.add_row(name, *(f"{column[name]:,.2f}" for column in columns))
    table.add_section()
    table.add_row("peak", *(f"{one.memory.total / 2**30:,.2f}" for one in made.stages))
    table.add_row("fits", *("yes" if one.fits else "no" for one in made.stages))
    table.add_row("largest micro-batch", *(f"{one.largest_micro_batch:,}" for one in made.stages))
    if made.own_stage.largest_checkpointed is not None:
        shown = [f"{one.largest_checkpointed:,}" for one in made.stages]
        table.add_row("with checkpointed activations", *shown)
    for where, part in (("in the machine's memory", "host"), ("on the node's disk", "disk")):
        held = [getattr(one.memory, part) for one in made.stages]
        if any(held):
            table.add_row(where, *(f"{one / 2**30:,.2f}" for one in held))
    return table


def _time_table(made: Plan) -> Table:
    table = Table()
    for column in ("throughput", "samples/s", "of peak", "time", f"cost at {made.price_per_gpu_hour:g} per GPU hour"):
        table.add_column(column, justify="left" if column == "throughput" else "right")
    rows: dict[str, Estimate | None] = {"assumed": made.assumed, "measured": made.measured}
    for name, one in rows.items():
        if one is not None:
            cells = (
                f"{one.samples_per_second:,.1f}",
                f"{one.utilisation:.1%}",
                duration(one.hours * 3600),
                f"{one.cost:,.2f}",
            )
            table.add_row(name, *cells)
    return table


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
