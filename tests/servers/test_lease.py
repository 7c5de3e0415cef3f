"""A lease over each of its slates: a file, a real etcd, and an API server that swaps like that of Kubernetes."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from infinillm.errors import BadRequest, Unavailable
from infinillm.servers import lease as leases
from infinillm.servers.lease import Alone, Campaign, Shared, Term
from infinillm.servers.slates import EtcdSlate, FileSlate, KubernetesSlate, Record, Slate
from tests.servers import places
from tests.servers.places import SOON, Api, api, free_ports

SECONDS = 2.0  # a writing is good for; the test moves the clock
PATIENCE = 2.0


@pytest.fixture(scope="module")
def etcd(etcd_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[places.Etcd]:
    """Started once; two of the three go on when a test has killed one."""
    with places.etcd(etcd_server, tmp_path_factory.mktemp("etcd")) as made:
        yield made


# --- one test over all slates ---------------------------------------------------------------------------------------


class World:
    """Where slates of one record are made, and the clock of who uses them."""

    def __init__(self, make: Callable[[], Slate]):
        self.make, self.now, self.made = make, 1000.0, list[Shared]()

    def lease(self, name: str, seconds: float = SECONDS) -> Shared:
        self.made.append(Shared(self.make(), name, seconds, lambda: self.now))
        return self.made[-1]


def account(folder: Path, token: str = "first") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "token").write_text(token + "\n")
    return folder


@pytest.fixture(params=["file", "etcd", "kubernetes"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param == "file":
        yield World(lambda: FileSlate(str(tmp_path / "lease"), PATIENCE))
    elif request.param == "etcd":
        endpoints = request.getfixturevalue("etcd").endpoints
        yield World(lambda: EtcdSlate(endpoints, f"infinillm/{tmp_path.name}", PATIENCE))
    else:
        with api() as server:
            pod = account(tmp_path / "account")
            yield World(lambda: KubernetesSlate("here", "controller", PATIENCE, server.url, pod))


def run(world: World, test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        try:
            await test()
        finally:
            for each in world.made:
                await each.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_one_leads_while_it_renews_and_another_once_it_has_been_silent_for_as_long_as_its_lease(world: World) -> None:
    async def test() -> None:
        a, b = world.lease("10.0.0.1:7000"), world.lease("10.0.0.2:7000")
        first = await a.hold(0, 0)
        assert first == Term("10.0.0.1:7000", first.epoch, ours=True)
        for _ in range(4):  # twice as long as it is good
            assert await b.hold(0, 0) == Term("10.0.0.1:7000", first.epoch, ours=False)
            world.now += SECONDS / 2
            assert await a.hold(first.epoch, 0) == first
        assert not (await b.hold(0, 0)).ours  # sees the last writing for the first time
        world.now += SECONDS - 0.001
        assert not (await b.hold(0, 0)).ours
        world.now += 0.001
        second = await b.hold(0, 0)
        assert second.ours
        assert second.epoch > first.epoch
        assert await a.hold(first.epoch, 0) == Term("10.0.0.2:7000", second.epoch, ours=False)

    run(world, test)


def test_who_has_not_looked_for_long_learns_nothing_from_its_clock_alone(world: World) -> None:
    async def test() -> None:
        a, b = world.lease("a"), world.lease("b")
        term = await a.hold(0, 0)
        await b.hold(0, 0)
        world.now += 100 * SECONDS
        assert (await a.hold(term.epoch, 0)).ours  # nobody took it
        assert not (await b.hold(0, 0)).ours  # another writing than the one it had looked at

    run(world, test)


def test_epochs_grow_over_all_holders_and_above_all_that_was_heard_of(world: World) -> None:
    async def test() -> None:
        a, b = world.lease("a"), world.lease("b")
        epochs = [(await a.hold(0, 0)).epoch]
        assert epochs[0] > 1_600_000_000_000
        epochs.append((await a.hold(0, 0)).epoch)  # it stood by meanwhile: another term
        await a.give_up()
        ahead = epochs[-1] + 10**9  # of everybody's clock
        epochs.append((await b.hold(0, ahead)).epoch)
        assert epochs[-1] == ahead + 1
        await b.give_up()
        epochs.append((await a.hold(0, 0)).epoch)
        assert epochs == sorted(set(epochs))
        await b.give_up()  # not its own any more: nothing happens
        assert (await a.hold(epochs[-1], 0)).epoch == epochs[-1]

    run(world, test)


def test_of_many_that_want_it_at_once_one_gets_it(world: World) -> None:
    async def test() -> None:
        candidates = [world.lease(f"c{at}") for at in range(8)]
        seen: set[int] = set()
        for _ in range(3):
            terms = await asyncio.gather(*(each.hold(0, 0) for each in candidates))
            (won,) = [at for at, term in enumerate(terms) if term.ours]
            assert terms[won].epoch not in seen
            seen.add(terms[won].epoch)
            again = await asyncio.gather(*(each.hold(0, 0) for at, each in enumerate(candidates) if at != won))
            assert set(again) == {Term(f"c{won}", terms[won].epoch, ours=False)}
            await candidates[won].give_up()

    run(world, test)


def test_a_late_writing_changes_nothing(world: World) -> None:
    async def test() -> None:
        slate, other = world.lease("a").slate, world.lease("b").slate
        record, nothing = await slate.read()
        assert record == Record()
        assert await slate.write(Record("a", 1, 2.0, 1), nothing)
        assert not await other.write(Record("b", 2, 2.0, 1), nothing)
        _, first = await other.read()
        assert await other.write(Record("b", 2, 3.0, 2), first)
        assert not await slate.write(Record("a", 1, 2.0, 1), first)
        assert (await slate.read())[0] == Record("b", 2, 3.0, 2)

    run(world, test)


def test_a_renewal_that_was_heard_late_is_still_ours(world: World) -> None:
    async def test() -> None:
        a = world.lease("a")
        term = await a.hold(0, 0)
        slate, real = a.slate, a.slate.write

        async def late(record: Record, version: str) -> bool:
            assert await real(record, version)  # what had timed out before arrives now
            return await real(record, version)

        slate.write = late  # type: ignore[method-assign]
        assert await a.hold(term.epoch, 0) == term

    run(world, test)


# --- what each can meet ---------------------------------------------------------------------------------------------


def test_a_file_that_is_no_lease_or_has_no_folder_is_refused(tmp_path: Path) -> None:
    for wrong in (str(tmp_path / "no" / "lease"), "relative", str(tmp_path)):
        with pytest.raises(BadRequest, match="an absolute path in a folder that exists"):
            FileSlate(wrong, PATIENCE)
    (tmp_path / "lease").write_text("something of somebody else")
    with pytest.raises(Unavailable, match="holds no lease of ours"):
        asyncio.run(Shared(FileSlate(str(tmp_path / "lease"), PATIENCE), "a", SECONDS, lambda: 0.0).hold(0, 0))
    assert (tmp_path / "lease").read_text() == "something of somebody else"


def test_a_file_that_somebody_keeps_locked_is_not_written(tmp_path: Path) -> None:
    import fcntl

    slate = FileSlate(str(tmp_path / "lease"), patience=0.05)
    with (tmp_path / "lease.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match="is locked by another process"):
            asyncio.run(slate.write(Record("a", 1, 1.0, 1), ""))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["lease.lock"]
    assert asyncio.run(slate.write(Record("a", 1, 1.0, 1), ""))


def test_a_lease_of_kubernetes_looks_like_one_and_its_token_may_change(tmp_path: Path) -> None:
    async def test(server: Api) -> None:
        pod = account(tmp_path / "account")
        slate = KubernetesSlate("here", "controller", PATIENCE, server.url, pod)
        a = Shared(slate, "pod-0:7000", 0.7, lambda: 0.0)
        term = await a.hold(0, 0)
        made = server.leases["controller"]
        assert (made["apiVersion"], made["kind"]) == ("coordination.k8s.io/v1", "Lease")
        assert made["spec"]["holderIdentity"].startswith("pod-0:7000_")
        assert (made["spec"]["leaseDurationSeconds"], made["spec"]["leaseTransitions"]) == (1, 1)
        assert made["metadata"]["annotations"] == {"infinillm.io/epoch": str(term.epoch)}
        made["metadata"]["labels"] = {"of": "somebody"}
        server.token = "second"
        with pytest.raises(Unavailable, match="401"):
            await a.hold(term.epoch, 0)
        account(tmp_path / "account", "second")
        assert await a.hold(term.epoch, 0) == term
        renewed = server.leases["controller"]
        assert renewed["metadata"]["labels"] == {"of": "somebody"}
        assert renewed["spec"]["acquireTime"] == made["spec"]["acquireTime"]
        assert renewed["spec"]["renewTime"] > made["spec"]["renewTime"]
        await a.give_up()
        assert "holderIdentity" not in server.leases["controller"]["spec"]
        await a.close()

    with api() as server:
        asyncio.run(asyncio.wait_for(test(server), 60))


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_the_lease_goes_on_while_etcd_loses_its_leader(etcd: places.Etcd, tmp_path: Path, how: signal.Signals) -> None:
    """With three members it takes an election; the leader of ours renews its term all the while."""

    async def test() -> None:
        while (at := etcd.leader()) < 0:
            await asyncio.sleep(0)
        first = [etcd.endpoints[at], *(each for each in etcd.endpoints if each != etcd.endpoints[at])]
        lease = Shared(EtcdSlate(first, str(tmp_path), 1.0), "a", 10.0, time.monotonic)
        term = await lease.hold(0, 0)
        etcd.processes[at].send_signal(how)
        try:
            deadline, renewed = time.monotonic() + SOON, 0
            while renewed < 3:  # the first may be the one that was on its way
                assert time.monotonic() < deadline
                try:
                    assert await lease.hold(term.epoch, 0) == term
                    renewed += 1
                except Unavailable:
                    pass
        finally:
            etcd.processes[at].send_signal(signal.SIGCONT)
        await lease.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_an_etcd_that_nobody_serves_is_unavailable() -> None:
    (port,) = free_ports(1)

    async def test() -> None:
        lease = Shared(EtcdSlate([f"127.0.0.1:{port}"], "k", 1.0), "a", 10.0, time.monotonic)
        with pytest.raises(Unavailable, match=f"etcd key 'k': 127.0.0.1:{port}: ConnectError"):
            await lease.hold(0, 0)
        await lease.close()

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize(
    "wrong",
    ["here", "file:", "etcd:host:1/k", "etcd:///k", "etcd://host:1", "etcd://a:1,,b:1/k", "kubernetes:one", "zk://a/b"],
)
def test_what_names_no_lease_is_refused(wrong: str) -> None:
    with pytest.raises(BadRequest, match="--lease must be") as caught:
        leases.lease(wrong, "a", 5.0, time.monotonic)
    assert caught.value.field == "lease"


def test_settings_name_the_slates(tmp_path: Path) -> None:
    made = {
        "file": leases.lease(f"file:{tmp_path}/lease", "a", 5.0, time.monotonic),
        "etcd": leases.lease("etcd://a:1,b:2/some/key", "a", 5.0, time.monotonic),
        "kubernetes": leases.lease("kubernetes:here/controller", "a", 5.0, time.monotonic),
        "": leases.lease("", "a", 5.0, time.monotonic),
    }
    kinds = {name: type(getattr(each, "slate", each)) for name, each in made.items()}
    assert kinds == {"file": FileSlate, "etcd": EtcdSlate, "kubernetes": KubernetesSlate, "": Alone}


# --- the campaign ---------------------------------------------------------------------------------------------------


class Candidate:
    """A controller that only leads or does not."""

    def __init__(self, world: World):
        self.world, self.epoch, self.seen, self.until = world, 0, 0, -math.inf
        self.leader = ""

    @property
    def leads(self) -> bool:
        return self.world.now < self.until

    def lead(self, epoch: int, until: float) -> None:
        self.epoch, self.until = epoch, until

    def stand_by(self, leader: str) -> None:
        self.until, self.leader = -math.inf, leader


def campaign(world: World, name: str) -> tuple[Candidate, Campaign]:
    candidate = Candidate(world)
    return candidate, Campaign(world.lease(name), candidate, lambda: world.now)


def test_a_leader_that_cannot_renew_has_stopped_before_another_one_begins(tmp_path: Path) -> None:
    world = World(lambda: FileSlate(str(tmp_path / "lease"), PATIENCE))

    async def test() -> None:
        (a, of_a), (b, of_b) = campaign(world, "a"), campaign(world, "b")
        await of_a.look()
        await of_b.look()
        assert (a.leads, b.leads, b.leader) == (True, False, "a")

        async def unreachable(epoch: int, heard: int) -> Term:
            raise Unavailable("the slate is gone")

        hold, of_a.lease.hold = of_a.lease.hold, unreachable  # type: ignore[method-assign]
        ended, began = 0.0, 0.0
        while not b.leads:
            world.now += 0.01
            await of_a.look()
            await of_b.look()
            ended = ended or (0.0 if a.leads else world.now)
            began = world.now
            assert began < 1000 + 2 * SECONDS
        assert 0 < ended <= began - SECONDS / 10
        of_a.lease.hold = hold  # type: ignore[method-assign]
        await of_a.look()
        assert (a.leads, a.leader, b.leads) == (False, "b", True)
        assert b.epoch > a.epoch

    run(world, test)


def test_who_is_told_of_a_larger_epoch_begins_again_above_it(tmp_path: Path) -> None:
    world = World(lambda: FileSlate(str(tmp_path / "lease"), PATIENCE))

    async def test() -> None:
        a, of_a = campaign(world, "a")
        await of_a.look()
        a.seen = a.epoch + 10**9
        a.stand_by("")
        await of_a.look()
        assert a.leads
        assert a.epoch == a.seen + 1

    run(world, test)


def test_a_term_that_was_renewed_too_late_is_not_gone_on_with(tmp_path: Path) -> None:
    world = World(lambda: FileSlate(str(tmp_path / "lease"), PATIENCE))

    async def test() -> None:
        a, of_a = campaign(world, "a")
        await of_a.look()
        hold, first = of_a.lease.hold, a.epoch

        async def slow(epoch: int, heard: int) -> Term:
            term = await hold(epoch, heard)
            world.now = a.until + 0.01
            return term

        of_a.lease.hold = slow  # type: ignore[method-assign]
        world.now = a.until - 0.01
        await of_a.look()
        assert not a.leads  # others may have been told so in between
        of_a.lease.hold = hold  # type: ignore[method-assign]
        await of_a.look()
        assert a.leads
        assert a.epoch > first

    run(world, test)


def test_a_leader_that_ends_leaves_at_once(tmp_path: Path) -> None:
    world = World(lambda: FileSlate(str(tmp_path / "lease"), PATIENCE))

    async def test() -> None:
        (a, of_a), (b, of_b) = campaign(world, "a"), campaign(world, "b")
        over = asyncio.Event()
        over.set()
        await of_a.look()
        await of_b.look()
        await of_a.run(over)
        assert not a.leads
        await of_b.look()
        assert b.leads
        assert b.epoch > a.epoch

    run(world, test)
