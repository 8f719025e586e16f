"""`microclip-deploy describe`: stands here until the group that also generates takes its place."""

import typer

from microclip_deploy.cli.describe_check import describe_check
from microclip_deploy.cli.help import SectionedCommand, SectionedGroup

app = typer.Typer(
    help="Class descriptions.", no_args_is_help=True, rich_markup_mode=None, cls=SectionedGroup
)
app.command("check", cls=SectionedCommand)(describe_check)


@app.callback()
def describe() -> None:
    """Class descriptions."""
