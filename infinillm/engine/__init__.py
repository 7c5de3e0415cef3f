"""The step loop: take, schedule, commit, announce, run, publish."""
