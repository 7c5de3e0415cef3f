"""`infinillm serve`: a local cluster with its start shown, and where to find it."""

from __future__ import annotations

import asyncio
import json
import sys

from infinillm import config
from infinillm.console.progress import Progress
from infinillm.servers import local


def run(settings: config.Serve) -> None:
    config.policy(settings.policy)  # what is wrong with it is told before anything starts
    with Progress() as progress:

        def announce(cluster: local.Cluster) -> None:
            progress.end()
            if not sys.stdout.isatty():  # for programs: one line of JSON, as every process says
                print(json.dumps(cluster.addresses), flush=True)
            print(_welcome(settings, cluster), file=sys.stderr, flush=True)

        asyncio.run(local.run(settings, progress.say, announce))


def _welcome(settings: config.Serve, cluster: local.Cluster) -> str:
    url = cluster.url
    return (
        f"\n  {settings.workers} workers, policy {settings.policy}, serving at {url}/v1\n"
        f"  its API:      {url}/docs\n"
        f"  talk to it:   infinillm chat --url {url}\n"
        f"  watch it:     infinillm top --url {url}\n"
        f"  end it:       Ctrl-C\n"
    )
