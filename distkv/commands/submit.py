"""`distkv submit`: a command as a job on a Ray cluster."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from distkv.errors import ConfigError
from distkv.option_checks import settle_path

LOCAL_ONLY = {"chat": "it talks to a terminal", "submit": "a job submits no other", "top": "it draws on a terminal"}

Command = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- COMMAND", help="What would stand behind distkv."),
]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME[=VALUE]", help="A variable that the job gets; it gets no others from here."),
]
Bring = Annotated[
    list[str] | None,
    typer.Option(
        "--bring",
        metavar="FILE",
        help="File, folder or glob in the working dir that comes back at the end.",
    ),
]


def _settled(option: typer.CallbackParam, value: str) -> str | Path:
    return value if "://" in value else settle_path(option.opts[0], value)


WorkingDir = Annotated[
    str,
    typer.Option(parser=str, callback=_settled, metavar="<path>", help="Folder, .zip or URI that the job runs in."),
]


def submit(
    context: typer.Context,
    command: Command = None,
    address: Annotated[
        str | None,
        typer.Option(help="The dashboard's; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265."),
    ] = None,
    working_dir: WorkingDir = ".",
    env: Env = None,
    bring: Bring = None,
    submission_id: Annotated[str | None, typer.Option(help="The job's name; else one is made.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's name and leave it alone.")] = False,
    follow: Annotated[str | None, typer.Option(metavar="JOB", help="A job that was submitted before.")] = None,
) -> None:
    """Run a distkv command as a job on a Ray cluster; follow it and end with its exit code."""
    if follow is not None and (command or env or bring or submission_id or no_wait or Path(working_dir) != Path.cwd()):
        raise ConfigError("--follow takes a job as it is; leave out all but --address")
    if follow is None:
        _check(context, command or [])
    from distkv.jobs.cluster import Cluster
    from distkv.jobs.submit import Job, attend, named_variables, print_notice
    from distkv.jobs.submit import submit as run

    if follow is not None:
        raise typer.Exit(attend(Cluster(address), follow, print_notice))
    variables = named_variables(env or [], os.environ)
    job = Job(command or [], str(working_dir), variables, bring or [], submission_id)
    cluster, name = run(address, job, print_notice)
    if no_wait:
        print(name)
    else:
        raise typer.Exit(attend(cluster, name, print_notice))


def _check(context: typer.Context, command: list[str]) -> None:
    """Raises what `distkv COMMAND` itself would raise for words that it does not understand."""
    if not command:
        raise ConfigError("there is no command to run; give one behind --, as in distkv submit -- stress --shape tiny")
    if command[0] in LOCAL_ONLY:
        raise ConfigError(f"{command[0]} cannot be a job: {LOCAL_ONLY[command[0]]}; run it here")
    root = context.find_root()
    group: Any = root.command
    words, parent = command, root
    while hasattr(group, "resolve_command"):
        name, group, words = group.resolve_command(parent, words)
        # what a group itself takes stands before the name of its command, so it is parsed by the command alone
        if hasattr(group, "resolve_command"):
            if not words:
                raise ConfigError(f"{name} needs a command of its own; see distkv {name} --help")
            continue
        group.make_context(name, list(words), parent=parent)
