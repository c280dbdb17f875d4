"""The commands of `ldadam-dist`. Each imports what it needs when it is called."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ldadam_dist._version import __version__
from ldadam_dist.cli import options as o

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For commands whose options are those of a module."""

_WrongUse: type[Exception] = typer.BadParameter.__mro__[2]  # ClickException; typer has a click of its own, or click's


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"ldadam-dist {__version__}\n")
        raise typer.Exit


@app.callback()
def command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """LDAdamW for sharded training: plan a run, check machines, draw curves, convert checkpoints.

    \b
    ldadam-dist plan configs/models/llama_7b.json --ranks 64 --rank 512
    ldadam-dist COMMAND --help
    """


@app.command(short_help="Memory and traffic of a run, before it starts.")
def plan(
    model: o.Model,
    ranks: Annotated[int | None, typer.Option(help="Number of ranks.", metavar="N", show_default=False)] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="The mesh in place of --ranks, as shard=16, replicate=4,shard=16 or shard=8,tp=8.",
            metavar="AXIS=N,...",
            show_default=False,
        ),
    ] = None,
    sharding: Annotated[
        str | None,
        typer.Option(
            help="one, ddp, fsdp2, hsdp, zero1, zero2 or zero3; by default fsdp2, or what the mesh says.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    gradient_sync: Annotated[
        str,
        typer.Option(help="What replicas of ddp and hsdp exchange: full (gradients) or lowrank.", metavar="WHAT"),
    ] = "full",
    rank: o.Rank = 128,
    rank_pattern: o.RankPattern = "",
    include: o.Include = None,
    exclude: o.Exclude = None,
    convolutions: o.Convolutions = False,
    proj_type: o.ProjType = "std",
    param_dtype: o.ParamDtype = "bfloat16",
    grad_dtype: Annotated[
        str | None,
        typer.Option(help="dtype of gradients; by default the weights'.", metavar="DTYPE", show_default=False),
    ] = None,
    error_dtype: o.ErrorDtype = None,
    state_dtype: o.StateDtype = None,
    no_error_feedback: o.NoErrorFeedback = False,
    error_in_grad: Annotated[
        bool, typer.Option("--error-in-grad", help="Keep the errors in the gradients' buffers.")
    ] = False,
    communication: Annotated[
        str, typer.Option(help="How matrices are stepped: auto, lowrank or gather.", metavar="HOW")
    ] = "auto",
    window_elements: Annotated[int, typer.Option(help="Elements of matrices in flight together.", metavar="N")] = 2**25,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help="Find the largest rank that fits: 80GiB, or a100, h100, h200, ...", metavar="SIZE", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every parameter.")] = False,
) -> None:
    """Memory and traffic of a run, before it is started: LDAdamW next to AdamW, 8-bit Adam and Muon.

    Reads a model's configuration and shards the model, without weights, as the run would. It needs no GPU, and
    downloads nothing. Weights, gradients, states and error of the fullest rank are counted; activations are not.

    \b
    ldadam-dist plan configs/models/llama_7b.json --ranks 8 --rank 512 --gpu-memory 80GiB
    ldadam-dist plan MODEL --mesh replicate=4,shard=16 --error-dtype int4
    ldadam-dist plan MODEL --sharding zero2 --ranks 64 --json
    """
    from ldadam_dist.cli.estimate import Settings, planning
    from ldadam_dist.cli.layouts import parse_layout
    from ldadam_dist.cli.report import Plan
    from ldadam_dist.cli.transformers import build_model

    layout = parse_layout(sharding, ranks, mesh, gradient_sync)
    limit = None if gpu_memory is None else o.parse_memory(gpu_memory)
    dtype = o.dtype_of("--param-dtype", param_dtype)
    gradients = dtype if grad_dtype is None else o.dtype_of("--grad-dtype", grad_dtype)
    if error_in_grad and gradients != dtype:
        raise ValueError(f"--error-in-grad with --grad-dtype {grad_dtype}: expected gradients of the weights' dtype.")
    groups = {**o.group_options(rank_pattern, include, exclude, convolutions), "proj_type": proj_type}
    stored = {"error_feedback": not no_error_feedback, "error_dtype": error_dtype, "state_dtype": state_dtype}
    more = {"error_in_grad": error_in_grad, "communication": communication, "window_elements": window_elements}
    with planning(partial(build_model, model), layout, dtype, gradients) as run:
        settings = Settings(rank, groups, {**stored, **more})
        found = Plan.of(run, settings, limit)
        typer.echo(json.dumps(found.as_dict(), indent=1) if as_json else str(found))


@app.command(short_help="What of a model is projected.")
def describe(
    model: o.Model,
    rank: o.Rank = 128,
    rank_pattern: o.RankPattern = "",
    include: o.Include = None,
    exclude: o.Exclude = None,
    convolutions: o.Convolutions = False,
    proj_type: o.ProjType = "std",
    param_dtype: o.ParamDtype = "bfloat16",
    error_dtype: o.ErrorDtype = None,
    state_dtype: o.StateDtype = None,
    no_error_feedback: o.NoErrorFeedback = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="One line for each parameter.")] = False,
) -> None:
    """What of a model is projected, and what that saves: ldadam_dist.describe, without the model's weights.

    \b
    ldadam-dist describe configs/models/llama_1b.json --rank 512
    ldadam-dist describe MODEL --include q_proj --include v_proj --rank-pattern v_proj=64
    """
    from ldadam_dist.cli.transformers import build_model
    from ldadam_dist.optimizer import LDAdamW
    from ldadam_dist.param_groups import build_param_groups
    from ldadam_dist.param_groups import describe as table_of

    groups = {**o.group_options(rank_pattern, include, exclude, convolutions), "proj_type": proj_type}
    built = build_model(model, o.dtype_of("--param-dtype", param_dtype))
    stored: dict[str, Any] = {"error_feedback": not no_error_feedback}
    stored |= {"error_dtype": error_dtype, "state_dtype": state_dtype}
    LDAdamW(build_param_groups(built, rank=rank, **groups), **stored)  # which refuses what does not fit
    typer.echo(table_of(built, verbose=verbose, rank=rank, **groups, **stored))


@app.command(context_settings=_PASSED_ON, add_help_option=False, short_help="Are the hosts of a run fit for it?")
def preflight(context: typer.Context) -> None:
    """Are the hosts of a run fit for it? Versions, devices, ports, clocks, disk, collectives and their bandwidth."""
    from ldadam_dist.preflight.__main__ import main

    raise typer.Exit(main(context.args, prog="ldadam-dist preflight"))


@app.command(short_help="Curves of runs of launch/pretrain.py.")
def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or their log.jsonl.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture, .png or .html.", metavar="FILE")] = Path(
        "curves.png"
    ),
) -> None:
    """Curves of runs of launch/pretrain.py: loss by tokens and by time, and what --metrics_every has measured.

    The .html holds its picture, and is viewed offline.

    \b
    ldadam-dist plot runs/ldadamw runs/adamw --output comparison.png
    """
    from ldadam_dist.curves import draw, read_runs

    draw(read_runs(runs), output)
    typer.echo(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}")


@app.command(
    context_settings=_PASSED_ON, add_help_option=False, short_help="Checkpoints of ZeRO to those of DCP, and back."
)
def convert(context: typer.Context) -> None:
    """Convert a checkpoint of DeepSpeed's ZeRO to one of torch.distributed.checkpoint, or back."""
    from ldadam_dist.convert import main

    raise typer.Exit(main(context.args, prog="ldadam-dist convert"))


@app.command(short_help="Is the installation sound?")
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the two processes.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that the two processes may take.", metavar="SECONDS")] = 60,
) -> None:
    """Is the installation sound? Versions, two steps on every device here, and two processes against one.

    Prints a line for each check. Exit code 0 if all is well, 1 if not: fit for Docker's HEALTHCHECK.

    \b
    ldadam-dist doctor
    ldadam-dist doctor --quick
    """
    from ldadam_dist.cli.doctor import examine

    if not 1 <= timeout <= 1e6:  # false for NaN
        raise ValueError(f"--timeout {timeout:g}: expected seconds from 1 to 1000000.")
    raise typer.Exit(0 if examine(typer.echo, quick=quick, timeout=timeout) else 1)


def run(arguments: Sequence[str] | None) -> int:
    """Run a command line; its exit code. Of wrong input one line on stderr tells."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(app(args=given or ["--help"], prog_name="ldadam-dist", standalone_mode=False) or 0)
    except SystemExit as end:
        return int(end.code or 0)
    except typer.Abort:
        return 130
    except _WrongUse as error:
        message = error.format_message()  # type: ignore[attr-defined]
    except (ValueError, OSError) as error:
        message = str(error)
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2
