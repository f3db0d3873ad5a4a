"""List the releases of a registry, newest first, with the aliases that point to them and their key figures.

python -m jobs.releases [registry=runs/registry]
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from latentray.config import command
from latentray.config.promote import ReleasesConfig
from latentray.registry import versions

KEY_FIGURES = ("heldout_loss", "fid", "samples.color_accuracy", "samples.shape_accuracy", "autoencoder.psnr")


def show(config: ReleasesConfig) -> None:
    console = Console(highlight=False)
    rows = versions.listing(config.registry)
    if not rows:
        console.print(
            f"No releases in {config.registry}.", "next: python -m jobs.promote model=<uri> report=<uri>", sep="\n"
        )
        return
    table = Table(title=config.registry)
    table.add_column("release", no_wrap=True)
    for name in ("alias", "created", "figures"):
        table.add_column(name, overflow="fold")
    for row in rows:
        figures = "\n".join(f"{name} {row.metrics[name]:.4g}" for name in KEY_FIGURES if name in row.metrics)
        table.add_row(row.id, ", ".join(row.aliases), row.created.removesuffix("+00:00"), row.problem or figures or "-")
    console.print(table)
    console.print(
        f"next: python -m jobs.serve registry={config.registry} alias=production", markup=False, soft_wrap=True
    )


def main() -> int:
    return command.run("releases", ReleasesConfig, show)


if __name__ == "__main__":
    sys.exit(main())
