"""How often and how much at a time: what a real cluster and a simulated one have in common, beside what is set."""

MOST_ADMITTED = 8  # sequences in one step
RETRY_SECONDS = 0.25  # between two wishes to borrow that were refused
IDLE_LOAN_SECONDS = 2.0  # after which what is borrowed and not used goes back
PLAN_BEATS = 4  # heartbeats between two plans: what a plan set going shows in the ledger by then
ARRIVAL_SECONDS = 0.1  # a routed request is in its node's queue by then, and so in its next report
