"""The step loop of one shard, in a thread of its own: take, schedule, commit, announce, run, publish.

Theory of operation. Everything that comes from outside (a request, a cancellation, the answer to a wish to borrow) is
a message in the inbox, taken between two steps; so sequences change in one thread only. `schedule` decides, `commit`
is the only place where a decision changes sequences and books, `run` computes, `publish` tells. When a remote node is
lost in the middle of a pass, nothing of that pass counts: the spans it held become holes, and the next step computes
what is missing. Where blocks are short the loop asks the process to borrow and goes on with what it can; it preempts
only when refused, for some time.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from queue import Empty, SimpleQueue

from infinillm.core.cost import Cost
from infinillm.core.layout import filled, grown, plan, without
from infinillm.core.pace import MOST_ADMITTED, MOST_REFUSED, RETRY_SECONDS
from infinillm.core.request import FINISHED, MOVED, Request, Sequence, total
from infinillm.core.scheduler import NEVER, Budget, Here, Shortage, need, schedule, shortage
from infinillm.core.types import Grow, Layout, NodeId, Refused, SeqId, Span, Step, TokenLogprob
from infinillm.engine.measures import count
from infinillm.engine.messages import (
    Borrowed,
    Cancel,
    HandOver,
    Load,
    Message,
    MoveBlocks,
    Output,
    Pass,
    Placement,
    Stop,
    Submit,
)
from infinillm.engine.moves import Moves
from infinillm.engine.names import Names
from infinillm.engine.runner import Runner, told_logprob
from infinillm.errors import InfinillmError, NodeLost, Overloaded, Unavailable
from infinillm.model.sampler import Choice
from infinillm.pool.ask import PooledAttention
from infinillm.pool.borrow import Lenders
from infinillm.pool.memory import Memory
from infinillm.telemetry import Metrics, log

MOST_FAILED = 3  # passes in a row that may raise
KEPT_PLACEMENTS = 256


class Engine:
    """See the theory of operation above.

    publish  called with the outputs of a step, from the engine's thread
    borrow   called with a `shortage` of blocks, and the request that waits for them where nothing else runs; answers
             later with a Borrowed message
    cost     of computing, where it is known
    """

    def __init__(
        self,
        node: NodeId,
        runner: Runner,
        memory: Memory,
        lenders: Lenders,
        budget: Budget,
        *,
        publish: Callable[[list[Output]], None],
        borrow: Callable[[Shortage, Request | None], None],
        cost: Cost | None,
        metrics: Metrics,
    ):
        self.node, self.runner, self.memory, self.lenders, self.budget = node, runner, memory, lenders, budget
        self.publish, self.borrow, self.cost, self.metrics = publish, borrow, cost, metrics
        self.attend = PooledAttention(node, memory, lenders, metrics)
        self.names = Names(node, memory, lenders)
        self.moves = Moves(node, memory, lenders, self.names, budget.moves, metrics)
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.sequences: dict[SeqId, Sequence] = {}
        self.prompts: dict[SeqId, dict[int, TokenLogprob]] = {}
        self.load = Load()
        self.finished: dict[SeqId, tuple[int, Layout]] = {}
        self.lost = self.repaired = 0  # tokens lost with other nodes, and computed again, since the start
        self.failure: BaseException | None = None
        self._step = 0
        self._failed = 0  # passes in a row that raised
        self._again: tuple[Grow, ...] = ()  # what nodes of a failed pass may not have heard
        self._asking = False
        self._ask_again = 0.0
        self._denied_since, self._starved = NEVER, 0  # wishes refused in a row while nothing ran
        self._stopping = self._handing_over = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the step in hand and end; what was running fails with a reason."""
        self.inbox.put(Stop())
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    # --- the loop ------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self.runner.settle()
            progress = False
            while not self._stopping:
                self.hear(block=not progress)
                if not self._stopping:
                    progress = self.turn()
            self._fail_all(Overloaded("the worker is shutting down"))
        except BaseException as defect:
            self.failure = defect
            self._fail_all(InfinillmError(f"the engine failed: {type(defect).__name__}: {defect}"))
            raise

    def turn(self) -> bool:
        """One turn of the loop; returns whether anything was computed."""
        with self.memory.lock, self.lenders.lock:  # nothing is lent or given back between a decision and its books
            for sequence in self.moves.repay(self.running) if not self._again else ():
                self._preempt(sequence)
            step = self.decide()
            self.commit(step)
            if step.chunks:
                self.moves.reserve(self.running)
        self._wish(step)
        if not step.chunks:
            self._tell_load(step)
            return False
        began = time.monotonic()
        try:
            told = replace(step, grow=(*self._again, *step.grow))
            layouts = {chunk.seq: self.sequences[chunk.seq].layout for chunk in step.chunks}
            plans = plan(told, layouts, self.budget.block_size, self.moves.now, self.moves.done)
            self.attend.begin(step.chunks, plans)
            sampled, prompts = self.runner.run(step.chunks, self.sequences, self.attend)
        except NodeLost as lost:
            self._lose(lost, step)
            return False
        except Exception as defect:  # noqa: BLE001  one request's data must not end everybody's engine
            self._give_up(step, defect)
            return False
        self._failed, self._again = 0, ()
        self.moves.switch(self.sequences)
        outputs = self.append(step, sampled, prompts)
        count(self.metrics, self.node, step, self.sequences, time.monotonic() - began)
        self._tell_load(step)
        self.publish(outputs)
        return True

    def decide(self) -> Step:
        """The next step. The caller holds the locks of memory and lenders."""
        self._step += 1
        blocks, waiting = self.memory.blocks, self.waiting[:MOST_ADMITTED]
        room = self.moves.beside({self.node: blocks.room, **self.lenders.room()})
        kept, denied = self.memory.kept_back(now := time.monotonic()), now - self._denied_since
        here = Here(blocks.count, kept, self.lenders.saved, denied, self.cost)
        return schedule(self._step, self.running, waiting, room, self.budget, here, self.names.match)

    def commit(self, step: Step) -> None:
        """The only place where a decision changes sequences and books. The caller still holds the locks."""
        size = self.budget.block_size
        for seq in step.preempt:
            self._preempt(self.sequences[seq])
        for seq in step.admit:
            sequence = self.sequences[seq]
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.pass_through("admit")
            shared = sequence.computed
            reused = [each for each in step.reuse if each.seq == seq]
            for each in reused:
                self.names.reuse(each)
                sequence.have(Span(self.node, each.first, each.first + each.blocks * size))
            self.metrics.add("prompt_tokens_shared_total", shared)
            self.metrics.add("prompt_tokens_cached_total", sequence.computed - shared)
            if not sequence.preemptions:
                sequence.cached = min(sequence.computed, len(sequence.request.prompt))
        for grow in step.grow:
            if grow.node == self.node:
                refused = self.memory.blocks.grow(grow.seq, grow.first, grow.blocks)
                assert refused is None, refused
            else:
                self.lenders.grow(grow)
        for seq in {grow.seq for grow in step.grow}:
            sequence = self.sequences[seq]
            sequence.layout = grown(sequence.layout, [g for g in step.grow if g.seq == seq], size)

    def append(
        self, step: Step, sampled: dict[SeqId, Choice], prompts: dict[SeqId, list[TokenLogprob]]
    ) -> list[Output]:
        """Count what was computed, add the new tokens, end what is finished."""
        outputs: list[Output] = []
        for chunk in step.chunks:
            sequence = self.sequences[chunk.seq]
            repaired = sequence.compute(chunk)
            self.repaired += repaired
            self.metrics.add("repaired_tokens_total", repaired)
            self.names.seal(sequence, chunk.start, chunk.stop)
            told: tuple[TokenLogprob, ...] = ()
            if chunk.seq in prompts:
                at = self.prompts.setdefault(chunk.seq, {})
                at.update({chunk.start + 1 + i: value for i, value in enumerate(prompts[chunk.seq])})
            if sequence.gap is not None:
                continue
            if chunk.seq in self.prompts and sequence.produced == 0:
                told = tuple(value for _, value in sorted(self.prompts.pop(chunk.seq).items()))
            if chunk.seq not in sampled and sequence.request.sampling.max_tokens:
                error = InfinillmError("the model computed a number that is not finite; another dtype may help")
                outputs.append(Output(chunk.seq, error=error))
                self._finish(sequence, "error")
                continue
            if chunk.seq not in sampled:  # no output was asked for
                outputs.append(Output(chunk.seq, prompt_logprobs=told, finish_reason="length", cached=sequence.cached))
                self._finish(sequence, "length")
                continue
            choice = sampled[chunk.seq]
            self.metrics.add("generation_tokens_total")
            sequence.tokens.append(choice.token)
            reason, stop = sequence.ends_with(choice.token)
            logprob = told_logprob(choice)
            logprobs = () if logprob is None else (logprob,)
            outputs.append(Output(chunk.seq, (choice.token,), logprobs, told, reason, stop, sequence.cached))
            if reason:
                self._finish(sequence, reason)
        return outputs

    # --- what comes from outside ---------------------------------------------------------------------------------

    def hear(self, block: bool) -> None:
        """Hear every message there is; `block` waits for the first, where nothing can be computed until one comes."""
        waits = RETRY_SECONDS if self._asking else max(self._ask_again - time.monotonic(), 0.001)
        timeout = waits if self.sequences else None
        try:
            while True:
                self._hear(self.inbox.get(block=block, timeout=timeout))
                block = False
        except Empty:
            pass

    def _hear(self, message: Message) -> None:
        match message:
            case Submit(request, names, shared, copy):
                sequence = Sequence(request, [*request.prompt, *request.already])
                for span in shared:
                    sequence.have(span)
                    if copy:
                        self.moves.bring(sequence, span)
                self.sequences[request.id] = sequence
                self.names.begin(sequence, names)
                at = next((i for i, s in enumerate(self.waiting) if s.request.arrival > request.arrival), None)
                self.waiting.insert(len(self.waiting) if at is None else at, sequence)
                self.metrics.add("prompt_tokens_total", len(request.prompt))
                if self._handing_over:
                    self._hand_over([sequence])
            case Cancel(id):
                if id in self.sequences:
                    self._finish(self.sequences[id], "cancelled")
            case Borrowed(answer, never):
                self._asking, denied = False, isinstance(answer, Refused)
                self._denied_since = min(self._denied_since, time.monotonic()) if denied else NEVER
                self.moves.hear_lent(denied)
                self._ask_again = time.monotonic() + RETRY_SECONDS
                self._starved = self._starved + 1 if denied and not self.running else 0
                for sequence in self.waiting if self._starved > MOST_REFUSED else ():
                    self._release(sequence.id)  # what it keeps at other nodes may be all that others wait for
                    sequence.let_go()
                if isinstance(answer, Refused) and (first := self.sequences.get(never)) in self.waiting:
                    assert first is not None
                    self._finish(first, "error")
                    shrunk = f"the pool has become too small for this request since it was accepted: {answer.reason}"
                    self.publish([Output(first.id, error=Unavailable(shrunk))])
            case MoveBlocks():
                self.moves.hear(message, self.sequences.get(message.seq))
            case HandOver(waiting):
                self._handing_over = True
                self._hand_over([*self.waiting] if waiting else [*self.running, *self.waiting])
            case Pass(id):
                self._hand_over([self.sequences[id]] if id in self.sequences else [])
            case Stop():
                self._stopping = True

    def _wish(self, step: Step) -> None:
        """Ask for room for what lenders want back, else for what the step was short of, and more for what grows."""
        short = bool(step.short or self.moves.homeless)
        self._denied_since = self._denied_since if short else NEVER
        if not short or self._asking or time.monotonic() < self._ask_again:
            return
        self._asking = True
        if self.moves.ask():
            self.borrow(Shortage(1, self.moves.homeless, self.moves.homeless, 0.0), None)
            return
        alone = self.waiting[0].request if self.waiting and not self.running else None
        blocks, size, more = self.memory.blocks, self.budget.block_size, self.lenders.borrowed - self.memory.blocks.lent
        self.borrow(shortage(step, self.running, self.waiting, size, blocks.count, more, self.cost), alone)

    # --- ends ----------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, reason: str) -> None:
        self.finished[sequence.id] = (sequence.computed, filled(sequence.layout, sequence.computed))
        while len(self.finished) > KEPT_PLACEMENTS:
            del self.finished[next(iter(self.finished))]
        self._release(sequence.id)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.pass_through("finish")
        del self.sequences[sequence.id]
        self.names.end(sequence.id)
        self.prompts.pop(sequence.id, None)
        self.metrics.add("requests_total", outcome=reason)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence.id)
        sequence.forget()
        self.running.remove(sequence)
        self.waiting.insert(0, sequence)
        self.metrics.add("preemptions_total")
        log("preempted", request=sequence.id, tokens=sequence.length)

    def _release(self, id: SeqId) -> None:
        with self.memory.lock:
            self.memory.blocks.release(id)
        self.lenders.release(id)
        self.moves.forget(id)
        self._again = tuple(g for g in self._again if g.seq != id)

    def _hand_over(self, sequences: list[Sequence]) -> None:
        """What they have stays where it is, under its names, for whoever goes on with them."""
        for sequence in sequences:
            self._finish(sequence, MOVED)
        if sequences:
            log("handed_over", requests=len(sequences))
            self.publish([Output(sequence.id, finish_reason=MOVED) for sequence in sequences])

    def _fail_all(self, error: InfinillmError) -> None:
        outputs = []
        for sequence in [*self.running, *self.waiting]:
            outputs.append(Output(sequence.id, error=error))
            self._finish(sequence, "error")
        self.publish(outputs)

    def _give_up(self, step: Step, defect: Exception) -> None:
        """A pass raised: its requests fail with the reason. Where nothing succeeds any more, the engine ends."""
        self._failed += 1
        if self._failed == MOST_FAILED:
            raise defect
        error = InfinillmError(f"the pass failed: {type(defect).__name__}: {defect}")
        log("pass_failed", requests=len(step.chunks), reason=error.message, trace=traceback.format_exc())
        self.lenders.reset(self.attend.told)
        self.moves.abandon()
        for chunk in step.chunks:
            self._finish(self.sequences[chunk.seq], "error")
        self.publish([Output(chunk.seq, error=error) for chunk in step.chunks])

    def _lose(self, lost: NodeLost, step: Step) -> None:
        """Forget what a lost node held; the pass in hand does not count. Holes are pending work from now on."""
        log("node_lost", node=lost.node, reason=lost.message)
        self.lenders.reset(self.attend.told)
        self.moves.abandon()
        self.lenders.drop(lost.node)
        self._again = tuple(g for g in (*self._again, *step.grow) if g.node not in (self.node, lost.node))
        for sequence in [*self.running, *self.waiting]:
            sequence.layout, gone = without(sequence.layout, lost.node)
            for span in gone:
                tokens = sequence.lose(span.start, span.stop)
                self.lost += tokens
                self.metrics.add("hole_tokens_total", tokens)

    # --- small things --------------------------------------------------------------------------------------------

    def _tell_load(self, step: Step) -> None:
        size = self.budget.block_size
        wanted = sum(need(s, size, 0) for s in self.waiting)
        layouts = {s.id: filled(s.layout, s.length) for s in self.running}
        missing = sum(total(s.holes) for s in (*self.running, *self.waiting))
        self.load = Load(
            len(self.running), len(self.waiting), wanted, layouts, self.lost, self.repaired, missing, self.moves.blocks
        )

    def placement(self, id: SeqId) -> Placement | None:
        """Where a request is that runs here, or where one was that ended here not long ago."""
        if (sequence := self.sequences.get(id)) is not None:
            layout = filled(sequence.layout, sequence.length)
            return Placement(sequence.state, sequence.length, layout, sequence.holes, self.moves.of(id))
        if id in self.finished:
            return Placement(FINISHED, *self.finished[id])
        return None
