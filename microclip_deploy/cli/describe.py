"""`microclip-deploy describe`: sentences about classes, written by a language model."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microclip_deploy.cli import next_steps
from microclip_deploy.cli.describe_check import (
    Clip,
    ClipWeights,
    Report,
    confused_by,
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
from microclip_deploy.console import bar, machine_stdout, notes, out, print_json, waiting
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
    pairs: Annotated[
        int, option(MODEL, "N", "Pairs of classes it confuses, to be compared.", min=0)
    ] = 30,
    images: Annotated[
        Path | None,
        option(MODEL, "PHOTOS", "Unlabelled photos: pairs that are confused on them come first."),
    ] = None,
    filtering: Annotated[
        bool,
        option(MODEL, None, "Drop what tells no class apart.", "--filter/--no-filter"),
    ] = True,
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
    from microclip_deploy.data.classes import read_classes, read_descriptions
    from microclip_deploy.describe.budget import Price
    from microclip_deploy.describe.endpoint import api_key
    from microclip_deploy.describe.judge import Judgement, judged
    from microclip_deploy.describe.run import run_describe
    from microclip_deploy.describe.sentence import Sentence
    from microclip_deploy.describe.settings import DEFAULT_ENDPOINT, Settings

    if (price_in is None) != (price_out is None) or (max_cost is not None and price_in is None):
        raise UsageError(
            "--max-cost: expected --price-in and --price-out with it, found not both; give the "
            "prices of a million tokens"
        )
    price = None if price_in is None or price_out is None else Price(price_in, price_out)
    names = read_classes(classes)
    text_model = opened(clip, clip_weights, report)
    if images is not None and text_model is None:
        raise UsageError("--images: expected --clip with it, found none; name the model")
    confused: list[tuple[int, int]] = []
    if text_model is not None and pairs:
        with waiting(notes, "looking for classes that are confused"):
            confused = confused_by(text_model, names, pairs, images)
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
        pairs=confused,
    )
    if dry_run:
        _show_plan(names, path, settings, as_json=as_json)
        return
    told: list[Judgement] = []

    def judge(sentences: Sequence[Sentence]) -> Judgement:
        with bar(notes, "comparing", "classes") as progress:
            tell = progress.update
            told.append(
                judged(sentences, names, domain, text_model, filtering=filtering, progress=tell)
            )
        return told[0]

    key = api_key(settings.endpoint)
    outcome = run_describe(names, path, settings, notes, key=key, judge=judge)
    show_remarks(told[0])
    if report is not None:
        provenance = read_descriptions(path, names).provenance
        write_page(report, told[0], provenance, _spent(outcome))
    if as_json:
        print_json(outcome.to_json())
    else:
        out.print(_told(outcome), markup=False, soft_wrap=True)
    use = ("adapt", "PHOTOS", "--classes", classes, "--descriptions", path, "-o", "runs/NAME")
    next_steps.tell(notes, (use, "adapt to your photos with these sentences"))


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


def _spent(outcome: "Outcome") -> dict[str, str]:
    """Return what a page tells of the calls."""
    used = outcome.used
    told = {"calls": str(outcome.calls + outcome.noted)}
    told |= {"tokens in": f"{used.tokens_in:,}", "tokens out": f"{used.tokens_out:,}"}
    return told if outcome.cost is None else {**told, "US dollars": f"{outcome.cost:.4f}"}


def _told(outcome: "Outcome") -> str:
    spent = "" if outcome.cost is None else f", {outcome.cost:.4f} USD"
    dropped = f", {outcome.dropped} dropped" if outcome.dropped else ""
    missing = (
        f"{outcome.missing} of the sentences asked for did not come; the same command asks again "
        "where a reply gave none\n"
        if outcome.missing
        else ""
    )
    return (
        f"{outcome.sentences} sentences about {outcome.classes} classes{dropped}: {outcome.path}\n"
        f"{missing}"
        f"{outcome.calls} calls made, {outcome.noted} were in the journal; "
        f"{outcome.used.tokens_in:,} tokens in, {outcome.used.tokens_out:,} out{spent}"
    )
