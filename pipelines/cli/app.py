"""Puts the ``coterie`` application together from its groups of commands.

Knows the order of the commands and the options that stand before them; knows nothing of what they do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from pipelines.cli import (
    attribute,
    audit,
    base,
    catalog,
    compare,
    compose,
    consent,
    demo,
    edit,
    enrol,
    experiment,
    expert,
    export,
    generate,
    measure,
    memorization,
    retrieval,
    train,
    tune,
)
from pipelines.cli.errors import guarded
from pipelines.cli.options import RegistryOption, examples

__all__ = ["Application", "app", "command"]


ORDER = (
    "base",
    "train",
    "expert",
    "register",
    "list",
    "show",
    "verify",
    "plan",
    "build",
    "add",
    "remove",
    "tune",
    "generate",
    "evaluate",
    "compare",
    "attribute",
    "memorization",
    "opt-out",
    "verify-optout",
    "index",
    "search",
    "export",
    "import",
    "audit",
    "experiment",
    "demo",
)
"""The commands in the order in which they are used."""


class Application(TyperGroup):
    """The root command; reports every error as `pipelines.cli.errors` says instead of with a traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands in the order of the help page."""
        return sorted(self.commands, key=ORDER.index)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run with ``args`` (None: those of the process) and exit, or return where not ``standalone_mode``."""

        def run_once() -> object:
            return super(Application, self).main(
                args, prog_name, complete_var, False, windows_expand_args, **extra
            )

        if not standalone_mode:
            return run_once()
        sys.exit(guarded(run_once))


app = typer.Typer(
    name="coterie",
    cls=Application,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain pages: a third of the start-up time, and they survive being copied
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "coterie base add ./smollm2 --name smollm2",
        "coterie train job.yaml --out trained",
        "coterie register trained/acme/contracts",
        "coterie plan manifest.yaml",
        "coterie build manifest.yaml composed",
        "coterie generate composed --prompt 'The licensee shall' --opt-out acme",
    ),
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("coterie")
        except PackageNotFoundError:  # run from a tree that was never installed
            number = "0+unknown"
        typer.echo(f"coterie {number}")
        raise typer.Exit


@app.callback()
def root(
    registry: RegistryOption = None,
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
    ),
) -> None:
    """Compose domain experts that were trained apart into one model, and leave any owner out exactly."""


app.add_typer(base.group, name="base")
app.command("train", epilog=train.EXAMPLES)(train.train)
app.add_typer(expert.group, name="expert")
app.command("register", epilog=enrol.EXAMPLES)(enrol.register)
app.command("list", epilog=catalog.LIST_EXAMPLES)(catalog.list_experts)
app.command("show", epilog=catalog.SHOW_EXAMPLES)(catalog.show)
app.command("verify", epilog=catalog.VERIFY_EXAMPLES)(catalog.verify)
app.command("plan", epilog=compose.PLAN_EXAMPLES)(compose.show_plan)
app.command("build", epilog=compose.BUILD_EXAMPLES)(compose.build_folder)
app.command("add", epilog=edit.ADD_EXAMPLES)(edit.add_to_folder)
app.command("remove", epilog=edit.REMOVE_EXAMPLES)(edit.remove_from_folder)
app.command("tune", epilog=tune.EXAMPLES)(tune.tune)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("evaluate", epilog=measure.EXAMPLES)(measure.evaluate_folder)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare_folder)
app.command("attribute", epilog=attribute.EXAMPLES)(attribute.attribute_request)
app.command("memorization", epilog=memorization.EXAMPLES)(memorization.memorization)
app.add_typer(consent.group, name="opt-out")
app.command("verify-optout", epilog=compose.VERIFY_EXAMPLES)(compose.verify_optout_folder)
app.add_typer(retrieval.group, name="index")
app.command("search", epilog=retrieval.SEARCH_EXAMPLES)(retrieval.search)
app.command("export", epilog=export.EXPORT_EXAMPLES)(export.export_folder)
app.command("import", epilog=export.IMPORT_EXAMPLES)(export.import_folder)
app.add_typer(audit.group, name="audit")
app.add_typer(experiment.group, name="experiment")
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)


def command() -> TyperGroup:
    """Return the application as a command object, ready for ``main()``."""
    built = get_command(app)
    assert isinstance(built, TyperGroup)
    return built
