"""`python -m bench`: the comparison of serving systems, which `make bench` runs."""

from bench.serving import main

main()
