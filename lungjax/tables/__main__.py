"""The studies' results tables, published and ours: python -m lungjax.tables --list

    python -m lungjax.tables --table=ct_cov19_val --workdir=runs/ct_cov19             # what is there
    python -m lungjax.tables --table=ct_cov19_val --workdir=runs/ct_cov19 --run       # and makes what is missing
    python -m lungjax.tables --smoke                                                  # tries every cell without data

Writes WORKDIR/tables/NAME.md, NAME.csv and pictures. A number is ours only if it comes from a finished run of that
very experiment on that very data set; everything else is `not run`, with the command that makes it.
"""

import os
import sys
from pathlib import Path

from absl import app, flags

from lungjax import cli, datasets
from lungjax import config as configs
from lungjax.config import experiments as experiment_files
from lungjax.tables import cells, published

FLAGS = flags.FLAGS

# The smoke run's programs run two steps each, so their compilation is what costs: without LLVM's expensive passes it
# takes a fraction of the time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_bool("list", False, "Prints every table with its title, its cells and its networks, and ends.")
    flags.DEFINE_string("table", None, "The table's name; see --list.")
    flags.DEFINE_string("workdir", None, "Where the table's runs live, each in NAME/seedN.")
    flags.DEFINE_bool("run", False, "Makes missing runs and goes on with unfinished ones, one after the other.")
    flags.DEFINE_integer("seeds", 3, "Runs of each experiment, with train.seed 0, 1, ...", lower_bound=1)
    flags.DEFINE_string("data_dir", "data", "Where lungjax.prepare wrote the data sets.")
    flags.DEFINE_string("weights_dir", None, "Where downloaded weight files lie; looked at first.")
    flags.DEFINE_multi_string("set", [], "Overrides one field in every run, such as train.devices=1; repeatable.")
    flags.DEFINE_integer("draws", 2000, "Bootstrap draws of patients and seeds.", lower_bound=100)
    flags.DEFINE_bool("smoke", False, "Tries every cell of every table (or of --table) without data, and ends.")


def main(_: list[str]) -> None:
    """Lists, tries, or runs and writes a table."""
    tables = published.TABLES
    if FLAGS.table is not None and FLAGS.table not in tables:
        raise ValueError(f"--table={FLAGS.table}: unknown table; {configs.nearest(FLAGS.table, tables)}")
    if FLAGS.list:
        print(listing())
        return
    if FLAGS.smoke:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from lungjax.tables import smoke  # here, after the flags: it imports jax

        chosen = {FLAGS.table: tables[FLAGS.table]} if FLAGS.table else tables
        failures = smoke.run(tables, chosen, lambda line: print(line, flush=True))
        if failures:
            print("\n".join(["Failures:", *failures]))
            sys.exit(1)
        return
    if not FLAGS.table:
        raise app.UsageError("--table=NAME is missing; --list shows the names")
    if not FLAGS.workdir:
        raise app.UsageError(f"--workdir=DIR is missing: where the runs of {FLAGS.table} live, or shall live")
    from lungjax.tables import charts, results, runs  # here, after the flags: they import jax

    weights_dir = Path(FLAGS.weights_dir).expanduser() if FLAGS.weights_dir else None
    places = Path(FLAGS.workdir).expanduser(), Path(FLAGS.data_dir).expanduser()
    options = runs.Options(*places, weights_dir, tuple(FLAGS.set), FLAGS.seeds)
    table = tables[FLAGS.table]
    for name in cells.experiments(table, tables)[:1]:
        runs.plan(name, options)  # a mistake in --set is answered at once, and not for each cell
    failed = results.run_missing(table, tables, options, lambda line: print(line, flush=True)) if FLAGS.run else {}
    reader = results.Reader(table, options, FLAGS.draws, failed)
    found = results.evaluate(table, tables, reader)
    path = results.write(table, found, options, reader, charts.draw)
    print(results.told(table, found))
    print(f"Table: {path}")
    if failed:
        print(f"{len(failed)} run{'s' * (len(failed) > 1)} failed:")
        for command, how in failed.items():
            print(f"  {command}\n    {how}")
        sys.exit(1)


def listing() -> str:
    """Returns each table's name, title, number of cells and networks."""
    lines = []
    for table in published.TABLES.values():
        names: dict[str, None] = {}
        data: dict[str, None] = {}
        experiments = [
            one.experiment for cell in table.cells for one in cells.candidates(table, cell, published.TABLES)
        ]
        for name in dict.fromkeys(experiments):
            config = experiment_files.load(name)
            names[config.model.name] = None
            data[datasets.resolve(config.data.dataset)[0].base] = None
        lines += [f"{table.name}", f"    {table.title}"]
        lines += [f"    {len(table.cells)} cells, data {', '.join(data)}, networks {', '.join(names)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, define_flags)
