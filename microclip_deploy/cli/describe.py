"""`microclip-deploy describe`: sentences about classes, written by a language model."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.describe_check import (
    Clip,
    ClipWeights,
    Report,
    describe_check,
    opened,
    show_remarks,
    write_page,
)
from microclip_deploy.cli.help import SectionedCommand, TargetGroup
from microclip_deploy.cli.options import (
    LANGUAGE,
    MODEL,
    OUTPUT,
    PHOTOS,
    AsJson,
    Domain,
    LanguageEndpoint,
    option,
)
from microclip_deploy.console import machine_stdout, notes, out, print_json
from microclip_deploy.errors import UsageError, require

if TYPE_CHECKING:
    from microclip_deploy.describe.estimate import Estimate
    from microclip_deploy.describe.run import Outcome
    from microclip_deploy.describe.settings import Settings

_MAKE = "make"
"""Name of the command that a class list stands for."""

BUDGET = "Budget, exit 6 where it is used up"
"""Section of --help."""


class _Describe(TargetGroup):
    target_command = _MAKE


app = typer.Typer(
    help="Let a language model write sentences about CLASSES, or do what is below.",
    cls=_Describe,
    no_args_is_help=True,
    subcommand_metavar="CLASSES [OPTIONS] | COMMAND [ARGS]...",
    rich_markup_mode=None,
)
command = partial(app.command, cls=SectionedCommand)


@app.callback()
def describe() -> None:
    """Let a language model write sentences about CLASSES, or do what is below.

    Example: microclip-deploy describe classes.txt -o descriptions.jsonl --model gpt-4o
    """


command("check")(describe_check)


@command(_MAKE, hidden=True)
def describe_make(
    classes: Annotated[
        Path,
        typer.Argument(metavar="CLASSES", help="Class names, one a line.", show_default=False),
    ],
    path: Annotated[
        Path,
        option(
            OUTPUT, "FILE.jsonl", "For `adapt --descriptions`; journal beside it.", "-o", "--out"
        ),
    ],
    model: Annotated[str, option(LANGUAGE, "NAME", "What the endpoint calls it.")],
    endpoint: LanguageEndpoint = None,
    domain: Domain = None,
    per_class: Annotated[
        int, option(PHOTOS, "N", "Sentences about each class.", min=1, max=100)
    ] = 20,
    concurrency: Annotated[
        int, option(LANGUAGE, "N", "Calls under way together.", min=1, max=256)
    ] = 4,
    temperature: Annotated[
        float, option(LANGUAGE, "T", "0 for the likeliest words.", min=0, max=2)
    ] = 0.1,
    seed: Annotated[int, option(LANGUAGE, "N", "For endpoints that take one.")] = 0,
    max_tokens_total: Annotated[
        int | None, option(BUDGET, "N", "Tokens in and out, earlier runs included.", min=1)
    ] = None,
    max_cost: Annotated[
        float | None, option(BUDGET, "USD", "Needs both prices; earlier runs included.", min=0)
    ] = None,
    price_in: Annotated[
        float | None, option(BUDGET, "USD", "Of a million tokens of prompts.", min=0)
    ] = None,
    price_out: Annotated[
        float | None, option(BUDGET, "USD", "Of a million tokens of replies.", min=0)
    ] = None,
    clip: Clip = None,
    clip_weights: ClipWeights = None,
    images: Annotated[
        Path | None,
        option(PHOTOS, "IMAGES", "Also compare classes that CLIP confuses on these photos."),
    ] = None,
    no_filter: Annotated[
        bool, option(MODEL, None, "Keep what tells no class from another.", "--no-filter")
    ] = False,
    report: Report = None,
    dry_run: Annotated[
        bool, option(OUTPUT, None, "Print the prompts and an estimate; ask nothing.", "--dry-run")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write sentences about each class, through any OpenAI-compatible endpoint.

    The key is read from OPENAI_API_KEY or MICROCLIP_LLM_KEY. A second run asks only what is
    missing. Exit 4 where the endpoint fails, 6 where the budget is used up; what is finished stays.

    Example: microclip-deploy describe classes.txt -o birds.jsonl --model gpt-4o --domain "birds"
    """
    require("openai", "describe")
    from microclip_deploy.data.classes import read_classes
    from microclip_deploy.describe.budget import Price
    from microclip_deploy.describe.comparisons import compared_pairs
    from microclip_deploy.describe.endpoint import api_key
    from microclip_deploy.describe.judge import judged
    from microclip_deploy.describe.run import run_describe
    from microclip_deploy.describe.settings import DEFAULT_ENDPOINT, Settings

    if (price_in is None) != (price_out is None) or (max_cost is not None and price_in is None):
        raise UsageError(
            "--max-cost: expected --price-in and --price-out with it, found not both; give the "
            "prices of a million tokens"
        )
    if clip is None and (images is not None or no_filter):
        raise UsageError("--images, --no-filter: expected --clip NAME with them, found none")
    price = None if price_in is None or price_out is None else Price(price_in, price_out)
    names = read_classes(classes)
    text_model = opened(clip, clip_weights, report)
    pairs = () if text_model is None else compared_pairs(text_model, names, images, notes)
    settings = Settings(
        model=model,
        endpoint=endpoint or DEFAULT_ENDPOINT,
        domain=domain,
        per_class=per_class,
        concurrency=concurrency,
        most_tokens=max_tokens_total,
        most_cost=max_cost,
        price=price,
        seed=seed,
        temperature=temperature,
        pairs=pairs,
    )
    if dry_run:
        _show_plan(names, path, settings, as_json=as_json)
        return
    judge = partial(judged, names=names, domain=domain, clip=text_model, filtering=not no_filter)
    key = api_key(settings.endpoint)
    outcome = run_describe(names, path, settings, notes, key=key, judge=judge)
    _show(outcome, report, as_json=as_json)
    use = ("adapt", "PHOTOS", "--classes", classes, "--descriptions", path, "-o", "runs/NAME")
    next_steps.tell(notes, (use, "adapt to your photos with these sentences"))


def _show(outcome: "Outcome", report: Path | None, *, as_json: bool) -> None:
    """Print what was done, and write the page if there is a path for it."""
    if outcome.judgement is not None:
        show_remarks(outcome.judgement)
    if report is not None and outcome.judgement is not None:
        from microclip_deploy.data.classes import read_descriptions

        read = read_descriptions(outcome.path, outcome.judgement.names)
        write_page(report, outcome.judgement, read.provenance, {"spent": _spent(outcome)})
    if as_json:
        print_json(outcome.to_json())
        return
    if outcome.judgement is not None:
        out.print(*outcome.judgement.tables(), sep="\n")
    out.print(_told(outcome), markup=False, soft_wrap=True)


def _show_plan(names: tuple[str, ...], path: Path, settings: "Settings", *, as_json: bool) -> None:
    """Print the prompts one by one, and what they would take."""
    from microclip_deploy.describe.estimate import estimate

    found = estimate(names, path, settings)
    shown = sys.stderr if as_json else machine_stdout()
    for call in settings.plan(names):
        shown.write(f"# {call.class_name}, {call.question}\n")
        shown.writelines(f"{message['role']}: {message['content']}\n" for message in call.messages)
        shown.write("\n")
    if as_json:
        print_json(found.to_json())
    else:
        out.print(_expected(found), markup=False, soft_wrap=True)


def _expected(found: "Estimate") -> str:
    about, most = found.usual, found.worst
    lines = [
        f"{found.calls} calls to make, {found.noted} in the journal",
        f"about {about.tokens_in:,} tokens in and {about.tokens_out:,} out; at most "
        f"{most.tokens_in:,} and {most.tokens_out:,}, if no question is asked again",
    ]
    if found.cost is not None:
        lines.append(f"about {found.cost:.4f} USD, at most {found.most_cost:.4f} USD")
    return "\n".join(lines)


def _told(outcome: "Outcome") -> str:
    dropped = f", {outcome.dropped} dropped" if outcome.dropped else ""
    missing = (
        f"{outcome.missing} of the sentences asked for did not come; the same command asks again "
        "where a reply gave none\n"
        if outcome.missing
        else ""
    )
    return (
        f"{outcome.sentences} sentences about {outcome.classes} classes{dropped}: {outcome.path}\n"
        f"{missing}{_spent(outcome)}"
    )


def _spent(outcome: "Outcome") -> str:
    cost = "" if outcome.cost is None else f", {outcome.cost:.4f} USD"
    return (
        f"{outcome.calls} calls made, {outcome.noted} were in the journal; "
        f"{outcome.used.tokens_in:,} tokens in, {outcome.used.tokens_out:,} out{cost}"
    )
