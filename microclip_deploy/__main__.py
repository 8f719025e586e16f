"""Lets `python -m microclip_deploy` do what `microclip-deploy` does."""

from microclip_deploy.cli.main import run_main

run_main()
