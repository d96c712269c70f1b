"""The `edgesd` command. One file per subcommand; heavy imports happen inside them."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

import click

from edgesd import __version__
from edgesd.cli import (
    bench,
    build,
    demo,
    deploy,
    evaluate,
    finalize,
    generate,
    inspect,
    kernels,
    keys,
    lora,
    pack,
    plan,
    profile,
    prompter,
    report,
    slots,
    targets,
    watch,
)
from edgesd.cli.common import fail, flush_streams, open_streams, say_error, say_lines, show_messages
from edgesd.cores import library_settings
from edgesd.errors import EXIT_STATUSES, UsageError

_STATUSES = "\n".join(f"{status:<5} {meaning}" for status, meaning in EXIT_STATUSES.items())
_EPILOG = f"""\b
Exit status:
{_STATUSES}

\b
Completion of commands, options and files; for good, put the line into your shell's startup file:
bash  eval "$(_EDGESD_COMPLETE=bash_source edgesd)"
zsh   eval "$(_EDGESD_COMPLETE=zsh_source edgesd)"
fish  _EDGESD_COMPLETE=fish_source edgesd | source
"""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EPILOG,
)
@click.version_option(__version__, prog_name="edgesd")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def cli(debug: bool) -> None:
    """Build text-to-image pipelines for edge boards, and run them there.

    \b
    edgesd demo                                   build the embedded pipeline and generate with it
    edgesd build MODEL --target raspberry-pi-5    make a bundle for a board
    edgesd deploy BUNDLE pi@board                 install it there, with edgesd itself
    edgesd generate BUNDLE -p "a red apple"       generate, on the board
    """


for command in (
    bench.bench_group,
    build.build_command,
    profile.profile_command,
    profile.calibrate_command,
    generate.generate_command,
    finalize.finalize_command,
    demo.demo_command,
    deploy.deploy_command,
    evaluate.eval_group,
    inspect.inspect_command,
    kernels.kernels_group,
    keys.keys_group,
    lora.lora_group,
    pack.pack_command,
    plan.plan_command,
    prompter.prompter_group,
    report.report_command,
    slots.slots_group,
    targets.targets_command,
    watch.watch_command,
):
    cli.add_command(command)


def main() -> NoReturn:
    """Run the command line; every failure is one line and a nonzero exit status."""
    open_streams()
    show_messages()
    os.environ.update(library_settings(os.environ))  # before what reads them is imported
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup keeps its meaning
        signal.signal(signal.SIGHUP, _terminated)
    arguments = sys.argv[1:]
    # Accept --debug after the subcommand, too.
    debug = "--debug" in arguments
    status = _status([argument for argument in arguments if argument != "--debug"], debug)
    flush_streams()
    sys.exit(status)


def _status(arguments: list[str], debug: bool) -> int:
    """The exit status of the command line `arguments`, once it is done."""
    try:
        if any("\0" in argument for argument in arguments):
            raise UsageError("an argument holds a NUL byte, which no name and no text has")
        result = cli.main(args=arguments, prog_name="edgesd", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.exceptions.NoArgsIsHelpError as exc:
        say_lines(exc.format_message())
        return exc.exit_code
    except click.ClickException as exc:
        context = exc.ctx if isinstance(exc, click.UsageError) else None
        command = f" ({context.command_path} --help)" if context else ""
        say_error(f"{exc.format_message()}{command}")
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return fail(KeyboardInterrupt(), debug)
    except Exception as exc:  # noqa: BLE001  turns any fault into a line
        return fail(exc, debug)


def _terminated(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
