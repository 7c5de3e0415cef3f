"""A worker: a node (K/V blocks) and, unless it is a memory worker, a shard (weights and an engine) in one process."""

from __future__ import annotations

import asyncio
import platform
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from infinillm import config, rpc
from infinillm.attention.store import Store
from infinillm.core.blocks import Blocks
from infinillm.core.claims import NOBODY
from infinillm.core.names import Uses
from infinillm.core.pace import IDLE_LOAN_SECONDS
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.policy.saving import TURN_SECONDS
from infinillm.core.recall import AT_ONCE, Terms
from infinillm.core.request import Request
from infinillm.core.scheduler import Budget, Shortage
from infinillm.core.types import DEVICE, HOST, Layout, Model, Node, NodeId, Refused, SeqId
from infinillm.engine.loop import Engine
from infinillm.engine.messages import Borrowed
from infinillm.engine.runner import Runner
from infinillm.errors import BadRequest, Broken, InfinillmError, Unavailable
from infinillm.kernels import bodies
from infinillm.model import files, weights
from infinillm.model.decoder import Decoder
from infinillm.model.spec import dtype_of, spec_of
from infinillm.pool.answer import POOL, PoolService
from infinillm.pool.borrow import Lenders
from infinillm.pool.find import find, kept_or_released
from infinillm.pool.memory import Memory
from infinillm.servers.membership import Membership, Report
from infinillm.servers.process import Told, ready, say
from infinillm.servers.shard import SHARD, ShardService
from infinillm.telemetry import Metrics, log
from infinillm.transport.lanes import Lanes

TICK_SECONDS = 0.5
LOOK_SECONDS = 0.05
KEPT_USES = 4096
LEAVING_SECONDS = 1.0  # in which gateways may find others that go on, while tokens still come
HANDED_OVER_SECONDS = 2.0  # in which whoever goes on with a request asks for what lies here
FINISHING = 0.75  # share of a drain in which requests may end by themselves; then they are handed over
LEAST_RETURN_SECONDS = 1.0  # to give loans back, however late it is


class Worker:
    """Everything one worker process owns, from `start` to `stop`."""

    def __init__(self, settings: config.Worker):
        self.settings = settings
        word = secrets.token_hex(4)
        self.incarnation = f"{time.time_ns():016x}-{word}"  # in the order of starts
        self.id = settings.id or f"{platform.node()}-{word}"
        self.address = ""
        self.draining = False
        self.uses = Uses(KEPT_USES)
        self.starving = NOBODY

    async def start(self) -> None:
        settings = self.settings
        self.loop = asyncio.get_running_loop()
        cache, self.cost = files.cache_folder(settings.cache_dir), config.cost(settings.profile)
        if settings.tier == HOST and not (settings.memory_only and settings.device != "cuda"):
            raise BadRequest(
                "host memory is a CPU's and serves no model: --memory-only, not --device cuda", field="tier"
            )
        found = "cuda" if torch.cuda.is_available() and settings.tier == DEVICE else "cpu"
        device = torch.device(found if settings.device == "auto" else settings.device)
        body = bodies.body(device, cache)
        path = await asyncio.to_thread(files.resolve, settings.model or None, cache, say)
        spec = spec_of(weights.read_config(path), settings.max_model_len or None)
        dtype = dtype_of(spec, settings.dtype)
        shape = spec.attention(settings.block_size, dtype)
        longest = settings.max_model_len or spec.context
        revision = await asyncio.to_thread(files.revision, path)
        model = Model(files.served_name(settings.model or None), shape, spec.context, longest, revision)
        count = settings.kv_blocks or int(settings.kv_memory_gib * 2**30) // shape.block_bytes
        if count < 1 and (settings.memory_only or settings.kv_memory_gib > 0):
            raise BadRequest(f"kv_memory_gib {settings.kv_memory_gib} holds no block", field="kv_memory_gib")
        if count < 1 and not settings.controller:
            raise BadRequest("a worker without memory needs a controller, to borrow by", field="controller")
        lendable = count if settings.memory_only else int(count * settings.lend_fraction)
        self.memory = Memory(Blocks(self.id, count, settings.block_size, lendable), Store(shape, count, device, body))
        self.metrics = Metrics("worker", node=self.id)
        self.lanes = Lanes(
            host=settings.host, patience=settings.patience_seconds, device=device, dial=rpc.blocking_channel
        )
        kind = "" if settings.port_kind == "auto" else settings.port_kind
        self.lenders = Lenders(
            self.id,
            self.incarnation,
            self.memory,
            lanes=self.lanes,
            port_kind=kind,
            metrics=self.metrics,
        )
        self.pool = PoolService(
            self.memory,
            describe=self.node,
            model=model.name,
            lanes=self.lanes,
            port_kind=kind,
            patience=settings.patience_seconds,
            loan_seconds=settings.loan_seconds,
            clock=time.monotonic,
            metrics=self.metrics,
            threads=settings.threads,
        )
        self.moving: set[asyncio.Task[None]] = set()
        self.obeying = asyncio.Lock()
        self.engine: Engine | None = None
        self.shard: ShardService | None = None
        services: list[tuple[Any, object]] = [(POOL, self.pool)]
        if not settings.memory_only:
            decoder = await asyncio.to_thread(_load, path, dtype, device, body, settings.max_model_len or None)
            self.engine = Engine(
                self.id,
                Runner(decoder, settings.threads),
                self.memory,
                self.lenders,
                Budget(
                    settings.max_num_batched_tokens,
                    settings.max_num_seqs,
                    settings.block_size,
                    settings.move_tokens_per_step,
                ),
                publish=lambda outputs: self.shard.publish(outputs) if self.shard else None,
                borrow=self._borrow,
                cost=self.cost,
                metrics=self.metrics,
            )
            self.shard = ShardService(
                self.engine,
                self.loop,
                spec.vocab,
                settings.block_size,
                settings.max_waiting,
                self._find,
                self.lenders.meet,
            )
            services.append((SHARD, self.shard))
        self.server = rpc.Server(settings.host, settings.port, services, extra_handlers=[self.lanes.service()])
        port = await self.server.start()
        self.address = self.lanes.address = settings.advertise or f"{settings.host}:{port}"
        self.metrics_port = self.metrics.serve(settings.host, settings.metrics_port)
        self.membership = Membership(settings.controller, self.report, model, self.cost, self._obey)
        self.tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self._tidy())]
        if settings.controller:
            self.tasks.append(asyncio.create_task(self.membership.run()))
        if self.engine is not None:
            self.engine.start()
        self.server.set_ready(True)

    async def stop(self, failure: BaseException | None, hurry: asyncio.Event) -> None:
        """Drain: take nothing new, hand over all requests, wait until what lies here has gone, give back loans.

        Where nobody else serves, what runs may end by itself first. After a `failure` (a process started later goes by
        our name, say) requests end at once, and are told why. In a `hurry` nothing is waited for but the engine.
        """
        began = time.monotonic()
        deadline = began + self.settings.drain_seconds
        self.draining = True
        self.pool.end()
        self.server.set_ready(False)
        if self.shard is not None and self.engine is not None:
            self.shard.draining = True
            if failure is not None:
                self.shard.fail(Unavailable(f"{self.id} ends: {failure}"))
            if not self.membership.others:  # nobody could go on with what runs
                self.shard.hand_over(waiting=True)
                await self._until(self._idle, began + FINISHING * self.settings.drain_seconds, hurry)
            asked = bool(self.shard.streams)
            self.shard.hand_over(waiting=True)
            self.shard.leave()
            await self._until(self._idle, min(time.monotonic() + LEAVING_SECONDS, deadline), hurry)
            self.shard.hand_over(waiting=False)
            await self._until(self._idle, deadline, asyncio.Event())
            came = time.monotonic() + HANDED_OVER_SECONDS * asked
            await self._until(lambda: False, min(came, deadline), hurry)
            await asyncio.to_thread(self.engine.stop)
        await self._until(lambda: not self.memory.held_by_others, deadline, hurry)
        if self.settings.controller:
            await self.membership.leave()
        with suppress(asyncio.TimeoutError):  # what is not given back lapses
            await asyncio.wait_for(self.lenders.close(), max(deadline - time.monotonic(), LEAST_RETURN_SECONDS))
        for task in (tasks := [*self.tasks, *self.moving]):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.pool.close()
        await self.server.stop(grace=1.0)
        self.metrics.close()

    def _idle(self) -> bool:
        return self.shard is None or not self.shard.streams or self.engine is None or not self.engine.alive

    async def _until(self, so: Callable[[], bool], deadline: float, hurry: asyncio.Event) -> None:
        """Wait until it is so, or until then, or until there is a hurry."""
        while not so() and time.monotonic() < deadline and not hurry.is_set():
            await asyncio.sleep(LOOK_SECONDS)

    # --- what the ledger hears -----------------------------------------------------------------------------------

    def node(self) -> Node:
        blocks = self.memory.blocks
        load = self.engine.load if self.engine is not None else None
        with self.memory.lock:
            return Node(
                id=self.id,
                incarnation=self.incarnation,
                address=self.address,
                blocks=blocks.count,
                lendable=blocks.lendable,
                used=blocks.used,
                cached=min(blocks.cached, blocks.room),  # what is not promised
                lent=blocks.lent,
                borrowed=self.lenders.borrowed,
                serves=self.engine is not None,
                tier=self.settings.tier,
                draining=self.draining,
                running=load.running if load else 0,
                waiting=load.waiting if load else 0,
                wanted=load.wanted if load else 0,
                lost=load.lost if load else 0,
                repaired=load.repaired if load else 0,
            )

    def report(self) -> Report:
        layouts: Mapping[SeqId, Layout] = self.engine.load.layouts if self.engine is not None else {}
        with self.memory.lock:  # counts and loans of one moment
            loans = self.memory.blocks.loans.values()
            lent = tuple(replace(loan, recalled=self.pool.claims.wanted(loan)) for loan in loans)
            return Report(self.node(), lent, layouts, frozenset(self.memory.blocks.marks))

    # --- sharing -------------------------------------------------------------------------------------------------

    async def _find(
        self, request: Request, names: Sequence[bytes], holders: Sequence[tuple[NodeId, str]]
    ) -> tuple[Layout, bool]:
        """What others keep of a request from now on, so that nobody computes it again, and whether a copy pays."""
        size, length = self.memory.blocks.block_size, len(request.prompt) + len(request.already)
        if not holders or request.sampling.prompt_logprobs is not None:
            return (), False
        names = names[: (length - 1) // size]
        with self.memory.lock:
            here = self.memory.blocks.leading(names)
        finding = asyncio.create_task(find(self.lenders, request.id, names, here, holders))
        layout = await kept_or_released(self.lenders, request.id, finding)
        if not layout or self.cost is None:
            return layout, False
        uses, there = self.uses.count(names[layout[-1].stop // size - 1]), sum(x.stop - x.start for x in layout)
        steps = uses * (request.sampling.max_tokens - len(request.already))
        return layout, self.cost.copying_pays(there, length - there, steps)

    # --- borrowing -----------------------------------------------------------------------------------------------

    def _borrow(self, short: Shortage, alone: Request | None) -> None:
        """From the engine's thread: ask in the event loop, answer into the engine's inbox."""
        asyncio.run_coroutine_threadsafe(self._ask(short, alone), self.loop)

    async def _ask(self, short: Shortage, alone: Request | None) -> None:
        assert self.engine is not None
        least, wanted, beyond, hold = short
        answer: int | Refused = Refused("no controller was named, so there is nobody to borrow from")
        never = alone is not None and not self.settings.controller
        try:
            if self.settings.controller:
                candidates = await self.membership.creditors(wanted, self.lenders.recalling, beyond is not None)
                if save := self.membership.may_save and beyond is not None:
                    least, wanted = 1, beyond
                    self.lenders.saved_until = time.monotonic() + TURN_SECONDS
                if save and wanted < 1:
                    answer = Refused("what is lent is enough once home is free")
                elif isinstance(candidates, Refused):
                    answer = candidates
                else:
                    answer = await self.lenders.borrow(least, wanted, candidates, Terms(save, hold))
                if isinstance(answer, Refused) and alone is not None:
                    never = alone.longest > await self.membership.capacity()
        except InfinillmError as error:
            answer = Refused(error.message)
        if isinstance(answer, Refused):
            log("borrow_refused", blocks=least, reason=answer.reason)
            if alone is not None and self._starves(alone.id) and not self.membership.another_saves:
                self.pool.recall(least)  # nothing runs here, for lack of what we lent
        self.engine.inbox.put(Borrowed(answer, alone.id if alone is not None and never else ""))

    def _starves(self, request: SeqId) -> bool:
        """Whether this request has been refused memory for so long that others have to give way."""
        self.starving = self.starving.after(request, now := time.monotonic())
        return self.starving.long(now)

    def _obey(self, order: MoveBlocks, address: str) -> None:
        task = asyncio.create_task(self._move(order, address))
        self.moving.add(task)
        task.add_done_callback(self.moving.discard)

    async def _move(self, order: MoveBlocks, address: str) -> None:
        """Reserve at the target, then tell the engine, in the order of the orders; unreserved, nothing changes."""
        if self.engine is None:
            return
        async with self.obeying:
            if order.target != self.id:
                candidates = [(order.target, address, order.blocks)]
                answer = await self.lenders.borrow(order.blocks, order.blocks, candidates, AT_ONCE)
                if isinstance(answer, Refused):
                    log("borrow_refused", blocks=order.blocks, reason=answer.reason)
                    return
            self.engine.inbox.put(order)

    # --- time ----------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """What must not wait for the network: renewing, expiring, measuring."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            slept, last = now - last - TICK_SECONDS, now
            self.pool.expire(grace=slept)
            self.lenders.renew()
            self._measure()
            if self.engine is not None and not self.engine.alive:
                raise Broken(f"the engine ended: {self.engine.failure!r}")

    async def _tidy(self) -> None:
        """Give back what nobody uses; this may wait for lenders that do not answer."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            await self.lenders.give_back_idle(IDLE_LOAN_SECONDS)

    def _measure(self) -> None:
        node, m = self.node(), self.metrics
        self.lenders.measure()
        m.set("kv_blocks_capacity", node.blocks)
        for state, blocks in (
            ("used", node.used),
            ("cached", node.cached),
            ("lent", node.lent),
            ("borrowed", node.borrowed),
            ("free", node.free - node.cached),
        ):
            m.set("kv_blocks", blocks, state=state)
        m.set("loans", len(self.memory.blocks.loans), side="lender")
        m.set("loans", len(self.lenders.room()), side="borrower")
        with self.memory.lock:
            m.set(
                "recalled_blocks", sum(map(self.pool.claims.wanted, self.memory.blocks.loans.values())), side="lender"
            )
        m.set("moving_blocks", self.engine.load.moving if self.engine is not None else 0)
        m.set("missing_tokens", self.engine.load.missing if self.engine is not None else 0)
        m.set("requests_running", node.running)
        m.set("requests_waiting", node.waiting)


def _load(path: Path, dtype: str, device: torch.device, body: Any, longest: int | None) -> Decoder:
    spec, tensors = weights.load(path, dtype, device, say, longest)
    return Decoder(spec, tensors, device, getattr(torch, dtype), body)


async def run(settings: config.Worker) -> None:
    """The process: ready line on stdout, SIGTERM and SIGINT end it cleanly, a second one in a hurry."""
    worker, told = Worker(settings), Told()
    await worker.start()
    metrics = f"{settings.host}:{worker.metrics_port}" if worker.metrics_port >= 0 else ""
    ready("worker", id=worker.id, address=worker.address, metrics=metrics)
    failure = await told.or_ended(worker.tasks)
    await worker.stop(failure, told.again)
    if failure is not None:
        raise failure
