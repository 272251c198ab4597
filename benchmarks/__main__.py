"""The command line: `python -m benchmarks list | run NAME … | report`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit("error: the benchmarks need more packages: pip install 'mlsec_jax[bench]'") from error
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from benchmarks import STARTED, _machine, _record, _report

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Size = enum.StrEnum("Size", [(name, name) for name in _record.SIZES])  # type: ignore[misc]
Device = enum.StrEnum("Device", [(name, name) for name in ("cpu", "gpu", "tpu")])  # type: ignore[misc]
MAX_SEED = 2**32 - 1  # JAX wraps larger ones
Out = Annotated[Path, typer.Option("--out", help="Folder of the records and plots.")]


@app.command("list")
def list_benchmarks() -> None:
    """Name every benchmark and what it shows."""
    table = Table(Column("benchmark", overflow="fold"), "shows", box=None)
    for name, summary in _record.summaries().items():
        table.add_row(escape(name), escape(summary))
    Console().print(table)


@app.command()
def run(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Which benchmarks; see `list`.")],
    size: Annotated[Size, typer.Option(help="small: seconds; full: at most hours; paper: everything, resumable.")] = (
        Size.small  # type: ignore[attr-defined]
    ),
    seed: Annotated[int, typer.Option(help="Of what is drawn; records say what every seed shares.", min=0, max=MAX_SEED)] = 0,
    out: Out = Path("runs"),
    device: Annotated[Device | None, typer.Option(help="Default: what JAX prefers here.")] = None,
    devices: Annotated[int | None, typer.Option(help="Host devices the CPU is split into.", min=1)] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Networks in bfloat16: clean-label benchmarks, accelerators.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace records of another size or seed.")] = False,
) -> None:
    """Run benchmarks; write a record and plots for each, and show its figures beside the paper's."""
    with _record.usage_errors():
        _record.check_names(names)
        _record.writable(out)
        if not force:
            _record.check_replaceable(out, names, str(size), seed)
        _machine.choose(device, devices)
        card = _machine.start(device)
        from benchmarks import _run  # it imports JAX, which `choose` must come before

        if bf16:
            _record.check_bfloat16(names)
        started: float | None = STARTED
        for name in names:
            said = f"{name} ({size}, seed {seed}) on {card}"
            Console(stderr=True).print(said, highlight=False, soft_wrap=True, markup=False)
            record = _run.run(name, size=str(size), seed=seed, out=out, device=card, started=started, bfloat16=bf16)
            started = None
            show(record, Console())


@app.command()
def report(out: Out = Path("runs")) -> None:
    """Render all records of a folder into one self-contained page, report.html."""
    with _record.usage_errors():
        records = _record.read_all(out)
        _record.writable(out)
        page = _report.page(records, out)
        _record.replace_file(out / "report.html", page.encode(errors="backslashreplace"))
        Console().print(str(out / "report.html"), soft_wrap=True, highlight=False, markup=False)


def show(record: dict[str, Any], console: Console) -> None:
    """Prints a record's figures beside the paper's."""
    title = f"{record['benchmark']} · {record['size']} · seed {record['seed']} · {record['seconds']:.1f} s"
    table = Table(Column("figure", overflow="fold"), title=escape(title), title_justify="left")
    table.add_column("paper", justify="right")
    table.add_column("ours", justify="right")
    table.add_column("source")
    for key, value in record["figures"].items():
        published = record["paper"].get(key)
        theirs, source = (_report.number(published["value"]), published["source"]) if published else ("", "")
        table.add_row(key, theirs, _report.number(value), escape(source))
    console.print(table)
    for reduction in record["reductions"]:
        console.print(f"reduced: {reduction}", highlight=False, markup=False)


if __name__ == "__main__":
    app()
