"""`python -m orchestration` is the `mapo` command."""

from mapo_entry import main

main()
