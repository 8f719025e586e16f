"""`audit`: the accuracy of two models on unlabeled photos, from answers of a person."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microclip_deploy import artifact
from microclip_deploy.cli.options import (
    METHOD,
    OUTPUT,
    PHOTOS,
    Adapted,
    AsJson,
    BatchSize,
    BitDepth,
    MaxPixels,
    ServingDevice,
    Threads,
    option,
)
from microclip_deploy.console import (
    bar,
    counter,
    notes,
    out,
    print_json,
    tell_left_out,
    tell_skipped,
    tell_warnings,
    waiting,
)
from microclip_deploy.data.photo import Remarks
from microclip_deploy.data.sources import ImageSet, list_images
from microclip_deploy.errors import Interrupted, printable

if TYPE_CHECKING:
    from microclip_deploy.audit.clicks import Sheet
    from microclip_deploy.audit.plan import Plan
    from microclip_deploy.audit.result import Result

LOCK = ".audit.lock"


def audit(
    directory: Adapted,
    photos: Annotated[
        Path,
        typer.Argument(metavar="PHOTOS", help="Unlabeled photos: a folder or a list."),
    ],
    out_dir: Annotated[
        Path, option(OUTPUT, "DIR", "Answers and result; an audit there goes on.", "-o", "--out")
    ],
    against: Annotated[
        Path | None,
        option(
            METHOD,
            "RUN_OR_EXPORT",
            "The rival. [default: the run's zero-shot model with the class names]",
        ),
    ] = None,
    clicks: Annotated[int, option(METHOD, "N", "Photos to ask about.", min=4)] = 100,
    seed: Annotated[int, option(METHOD, "N", "Of the draw.", min=0)] = 0,
    csv_only: Annotated[
        bool,
        option(PHOTOS, None, "No page: fill in clicks.csv and run again.", "--csv"),
    ] = False,
    browser: Annotated[bool, option(PHOTOS, None, "Open the page.")] = True,
    device: ServingDevice = "auto",
    batch_size: BatchSize = 64,
    max_pixels: MaxPixels = None,
    bit_depth: BitDepth = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure two models on photos without labels, by asking you about a few of them.

    The photos that decide are drawn at random, most of them where the models differ; a local page
    asks about one after the other. After Ctrl-C the same command goes on.

    Example: microclip-deploy audit runs/birds new/ -o audits/birds
    """
    from microclip_deploy.audit.clicks import Sheet
    from microclip_deploy.audit.desk import Desk
    from microclip_deploy.audit.result import Result
    from microclip_deploy.audit.server import serve_page
    from microclip_deploy.audit.wording import write_result

    own = {"max_pixels": max_pixels, "bit_depth": bit_depth, "threads": threads}
    with ExitStack() as stack:
        busy = "another audit is at work here; end it, or give another -o"
        stack.enter_context(artifact.exclusive(out_dir, busy, LOCK))
        with counter(notes, "looking for photos") as found:
            listed = list_images(photos, on_found=found)
        tell_left_out(listed.left_out.summary(), notes)
        plan, grown = _plan(
            out_dir, listed, (directory, against, device), clicks, seed, batch_size, **own
        )
        sheet = Sheet(out_dir, plan)
        sheet.begin(again=grown)
        try:
            if not csv_only and not Result(plan, sheet.read()).complete:
                serve_page(Desk(plan, sheet, listed.root), browser=browser, tell=_tell_page)
        except Interrupted as stopped:
            raise _paused(plan, sheet, out_dir, stopped) from stopped
        finally:
            result = Result(plan, sheet.read())
            write_result(out_dir, result)
    _tell(result, out_dir, sheet.path, csv_only=csv_only, as_json=as_json)


def _plan(
    out_dir: Path,
    listed: ImageSet,
    which: tuple[Path, Path | None, str],
    clicks: int,
    seed: int,
    batch_size: int,
    **own: int | None,
) -> "tuple[Plan, bool]":
    """Return the plan of the audit in a folder, and whether it has more photos than before.

    Models are opened only where no photo was drawn yet, or more are wanted.
    """
    from microclip_deploy.audit import plan as plans
    from microclip_deploy.audit.models import model_facts, open_models, opinions

    directory, against, device = which
    known, facts = plans.read_plan(out_dir), model_facts(directory, against)
    if known is not None:
        plans.require_same(known, facts, plans.fingerprint(listed), seed, out_dir)
        if clicks <= len(known.drawn) or len(known.drawn) == known.photos:
            return known, False
    remarks = Remarks()
    with ExitStack() as stack:
        with waiting(notes, f"opening {printable(directory)}"):
            models = stack.enter_context(open_models(directory, against, device, **own))
        with bar(notes, "classifying", "photos") as progress:
            said = opinions(
                models,
                listed.paths,
                batch_size=batch_size,
                remarks=remarks,
                progress=progress.update,
            )
        plan = plans.make_plan(facts, models[0], said, listed, clicks=clicks, seed=seed)
    tell_warnings(remarks.lines(), notes)
    tell_skipped(said.bad, notes)
    if known is not None:
        plan = plans.enlarged(known, plan)
    plans.write_plan(out_dir, plan)
    return plan, known is not None


def _tell_page(url: str) -> None:
    notes.print(f"page: {url}", markup=False)
    notes.print("answer there; Ctrl-C stops, every answer is kept, and the same command goes on")


def _paused(plan: "Plan", sheet: "Sheet", out_dir: Path, stopped: Interrupted) -> Interrupted:
    from microclip_deploy.audit.clicks import handled

    return Interrupted(
        f"stopped after {handled(sheet.read())} of {len(plan.drawn)} photos; every answer is in "
        f"{printable(out_dir)}; the same command goes on",
        stopped.exit_code - 128,
    )


def _tell(result: "Result", out_dir: Path, clicks: Path, *, csv_only: bool, as_json: bool) -> None:
    from microclip_deploy.audit.wording import AUDIT, document, sentences, tables

    if as_json:
        print_json(document(result))
    else:
        if result.handled:
            out.print(*tables(result), sep="\n")
        for sentence in sentences(result):
            out.print(sentence, markup=False, soft_wrap=True)
        if more := result.class_clicks():
            out.print(
                f"For the accuracy of another predicted class: about {more} more clicks.",
                soft_wrap=True,
            )
    if csv_only and not result.complete:
        notes.print(
            f"answers: fill in the column 'answer' of {printable(clicks)} from the top (a class "
            "name, neither or skip), and run the same command again",
            markup=False,
        )
    notes.print(f"result: {printable(out_dir / AUDIT)}", markup=False)
