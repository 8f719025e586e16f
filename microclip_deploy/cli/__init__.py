"""The command line: what each command does between parsing and printing."""
