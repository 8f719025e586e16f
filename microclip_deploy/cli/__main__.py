"""`python -m microclip_deploy.cli`."""

from microclip_deploy.cli.main import run_main

run_main()
