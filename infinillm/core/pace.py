"""How often and how much at a time: what a real cluster and a simulated one have in common, beside what is set."""

MOST_ADMITTED = 8  # sequences in one step
RETRY_SECONDS = 0.25  # between two wishes to borrow that were refused
IDLE_LOAN_SECONDS = 2.0  # after which what is borrowed and not used goes back
PLAN_BEATS = 4  # heartbeats between two plans: what a plan set going shows in the ledger by then
ARRIVAL_SECONDS = 0.1  # a routed request is in its node's queue by then, and so in its next report
MOST_REFUSED = 20  # wishes in a row, before waiting requests let go of what others keep for them
# Who gives way computes again what it had: two short nodes that recalled at once from each other served half as much.
RECALL_AFTER_SECONDS = 50.0  # that a request waits alone and is refused, before what its node lent is wanted back
LEFT_ALONE_TIMES = 5.0  # as long as a prompt takes to compute, what is lent for it is not wanted back
MOST_HELD_SECONDS = 86_400.0  # for which nothing of a loan is wanted back: 2M tokens take an A100 two hours
GRACE_SECONDS = 5.0  # in which many a request ends that lies at a lender which wants blocks back
REST_SECONDS = 10.0  # after a recall; else the borrower has the blocks again before those who waited for them
DOUBT_SECONDS = 3.0  # a borrower that lives and needs its blocks talks again with its next step
SILENT_BEATS = 6  # heartbeats after which a node that says nothing has left
