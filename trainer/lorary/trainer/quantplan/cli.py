"""``lorary quantize-plan BASE``: which layers stay whole within a budget of bits."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorary.errors import AlreadyExists, InvalidRequest, MissingDependency
from lorary.registry.cli_support import console, print_json, table
from lorary.trainer.quantplan.allocate import parse_budget
from lorary.trainer.recipe import DataRecipe
from lorary.trainer.threads import use_threads

if TYPE_CHECKING:
    from lorary.trainer.quantplan.run import Planned

app = typer.Typer(
    name="quantize-plan",
    help="Plan which layers of a base stay whole within a budget of bits.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
_EPILOG = (
    "Examples: lorary quantize-plan smollm2-135m --budget 5.0bits · "
    "lorary quantize-plan ./my-base --budget 6bits --text corpus.txt --output plans/six.yaml · "
    "lorary serve --base smollm2-135m --quantize-plan quantize-plan.yaml"
)


class Format(StrEnum):
    """What layers that are not kept whole are quantized to."""

    nf4 = "nf4"
    int8 = "int8"


@app.command(epilog=_EPILOG)
def quantize_plan(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Short name, folder or Hub id of a base.")
    ],
    budget: Annotated[
        str, typer.Option(metavar="BITS", help="Mean bits of a linear weight, such as 5.0bits.")
    ],
    kept: Annotated[
        Format, typer.Option("--format", help="Of the layers that are not kept whole.")
    ] = Format.nf4,
    text: Annotated[
        Path | None, typer.Option(help="A text or data file to measure on, instead of --source.")
    ] = None,
    source: Annotated[
        str, typer.Option(help="A data source that lorary train knows.")
    ] = "news-headlines",
    output: Annotated[
        Path, typer.Option(help="The plan; figures and picture go beside it.")
    ] = Path("quantize-plan.yaml"),
    samples: Annotated[
        int, typer.Option(min=1, help="Blocks of text to measure layers on, and as many for plans.")
    ] = 32,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a block.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the tokens drawn from the base.")] = 0,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier plan.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure what quantizing each layer costs, keep the dearest whole, and write plan and curve."""
    bits = parse_budget(budget)
    if output.suffix not in (".yaml", ".yml"):
        raise InvalidRequest(f"--output is '{output}'; it must end in .yaml", field="output")
    if output.exists() and not force:
        raise AlreadyExists(
            f"'{output}' exists. Choose another --output, or replace it with --force."
        )
    data = DataRecipe(
        source="file" if text else source, path=str(text) if text else "", shape="text"
    )
    use_threads(threads)
    for name in ("torch", "transformers", "bitsandbytes"):
        if not find_spec(name):
            raise MissingDependency(
                f"planning needs '{name}', which is not installed. Run: pip install 'lorary[train]'"
            )
    from lorary.bases import find_base
    from lorary.bases.load import load_tokenizer
    from lorary.trainer.progress import Reporter
    from lorary.trainer.quantplan.run import make_plan, write_plan
    from lorary.trainer.quantplan.text import make_blocks
    from lorary.trainer.sources import open_source

    reporter = Reporter()
    found = find_base(base, progress=reporter.note)
    tokenizer = load_tokenizer(found)
    texts = (example.text for example in open_source(data).read())
    blocks = make_blocks(texts, tokenizer, count=samples, length=length)
    planned = make_plan(
        found,
        blocks,
        budget=bits,
        quantization=kept.value,
        device=device,
        seed=seed,
        reporter=reporter,
    )
    about = {
        "text": str(text or source),
        "blocks": samples,
        "block_tokens": length,
        "seed": seed,
    }
    write_plan(output, planned, found, about)
    _print(planned, output, as_json=as_json)


def _print(planned: Planned, output: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "plan": str(output),
                "budget_bits": planned.budget,
                "kept_whole": [rule.modules for rule in planned.plan.rules],
                "points": [asdict(point) for point in planned.points],
                "sensitivity_nats_per_token": planned.sensitivity,
            }
        )
        return
    rows = table(
        "plan", "bits", "MiB", "whole layers", "perplexity", "nats from whole", title=str(output)
    )
    for point in planned.points:
        rows.add_row(
            point.name,
            f"{point.bits:.3f}",
            f"{point.num_bytes / 2**20:.2f}",
            str(point.num_whole),
            f"{point.perplexity:.4f}",
            f"{point.divergence:.5f}",
        )
    console().print(rows)
    console().print(f"next: lorary serve --base … --quantize-plan {output}", highlight=False)
