"""Compares published results with ours in tables: python -m lungjax.tables --list

    python -m lungjax.tables --table=ct_cov19_val --workdir=runs/ct_cov19             # from finished runs
    python -m lungjax.tables --table=ct_cov19_val --workdir=runs/ct_cov19 --run       # also executes missing runs
    python -m lungjax.tables --pool --workdir=runs/mine                               # any runs, pooled over seeds

Writes WORKDIR/tables/NAME.md, NAME.csv and figures, and prints the page. Only finished runs of exactly the same
experiment on the same data set count. Cells without such runs are `not run`, and the page lists the missing commands.
"""

import sys
from pathlib import Path

from absl import app, flags

from lungjax import cli, datasets
from lungjax.config import experiments as experiment_files
from lungjax.config import nearest
from lungjax.report.templating import count
from lungjax.runtime.advice import in_user_form
from lungjax.tables import cells, published

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_bool("list", False, "List the tables with their titles, data sets and networks.")
    flags.DEFINE_string("table", None, "Name of the table; see --list.")
    flags.DEFINE_string("workdir", None, "Folder of the runs, which are in NAME/seedN.")
    flags.DEFINE_bool("run", False, "Execute missing and unfinished runs, one after the other.")
    flags.DEFINE_integer("seeds", 3, "Number of runs per experiment, with train.seed 0, 1, ...", lower_bound=1)
    flags.DEFINE_string("data_dir", "data", "Folder of the prepared data sets.")
    flags.DEFINE_string("weights_dir", None, "Folder of downloaded weight files, searched first.")
    flags.DEFINE_multi_string("set", [], "Override a field in every run, such as train.devices=1; repeatable.")
    flags.DEFINE_integer("draws", 2000, "Bootstrap draws over patients and seeds.", lower_bound=100)
    flags.DEFINE_bool("pool", False, "Print the test scores of all runs below --workdir, pooled over train.seed.")


def main(_: list[str]) -> None:
    """Lists tables, or executes runs and writes a table."""
    tables = published.TABLES
    if FLAGS.table is not None and FLAGS.table not in tables:
        raise ValueError(f"--table={FLAGS.table}: unknown table; {nearest(FLAGS.table, tables)}")
    if FLAGS.list:
        print(listing())
        return
    if FLAGS.pool and FLAGS.workdir:
        from lungjax.tables import pooled  # here: other calls don't need it

        print(pooled.markdown(Path(FLAGS.workdir).expanduser(), FLAGS.draws))
        return
    if not FLAGS.table and not FLAGS.pool:
        raise app.UsageError("--table=NAME is missing; --list shows the names")
    if not FLAGS.workdir:
        raise app.UsageError("--workdir=DIR is missing: the folder of the runs")
    from lungjax.tables import charts, results, runs  # here: they import jax

    weights_dir = Path(FLAGS.weights_dir).expanduser() if FLAGS.weights_dir else None
    folders = Path(FLAGS.workdir).expanduser(), Path(FLAGS.data_dir).expanduser()
    options = runs.Options(*folders, weights_dir, tuple(FLAGS.set), FLAGS.seeds)
    table = tables[FLAGS.table]
    runs.plan(cells.experiments(table, tables)[0], options)  # reports a mistake in --set once, not for each cell
    failed = results.run_missing(table, tables, options, say) if FLAGS.run else {}
    answers = results.evaluate(table, tables, results.Reader(table, options, FLAGS.draws, failed))
    path = results.write(table, answers, options, charts.draw(table, answers, options.workdir / "tables"))
    say(path.read_text("utf-8"))
    print(f"Table: {path}")
    if failed:
        print(f"{count(len(failed), 'run')} failed:")
        for run, error in failed.items():
            say(f"  {run}\n    {error}")
        sys.exit(1)


def say(text: str) -> None:
    """Prints a text; if run.sh is in use, rewrites the commands in it for run.sh."""
    print(in_user_form(text), flush=True)


def listing() -> str:
    """Returns name, title, number of cells, data sets and networks of each table."""
    lines = []
    for table in published.TABLES.values():
        configs = [experiment_files.load(name) for name in cells.experiments(table, published.TABLES)]
        networks = dict.fromkeys(config.model.name for config in configs)
        data = dict.fromkeys(datasets.resolve(config.data.dataset)[0].base for config in configs)
        lines += [table.name, f"    {table.title}"]
        lines += [f"    {len(table.cells)} cells, data {', '.join(data)}, networks {', '.join(networks)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, define_flags)
