"""The step loop of one shard, in a thread of its own: take, schedule, commit, announce, run, publish.

Theory of operation. Everything that comes from outside (a request, a cancellation, the answer to a wish to borrow) is
a message in the inbox, taken between two steps; so sequences change in one thread only. `schedule` decides, `commit`
is the only place where a decision changes sequences and books, `run` computes, `publish` tells. When a remote node is
lost in the middle of a pass, nothing of that pass counts: the spans it held become holes, and the next step computes
what is missing. Where blocks are short the loop asks the process to borrow and goes on with what it can; it preempts
only when refused.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from queue import Empty, SimpleQueue

from infinillm.core.blocks import prefix_hashes
from infinillm.core.layout import filled, grown, plan, without
from infinillm.core.request import FINISHED, Request, Sequence
from infinillm.core.scheduler import Budget, Match, need, schedule
from infinillm.core.types import Grow, Layout, NodeId, Refused, SeqId, Span, Step, TokenLogprob
from infinillm.engine.messages import Borrowed, Cancel, Load, Message, MoveBlocks, Output, Stop, Submit
from infinillm.engine.moves import Moves
from infinillm.engine.runner import Runner, told_logprob
from infinillm.errors import InfinillmError, NodeLost, Overloaded, Unavailable
from infinillm.model.sampler import Choice
from infinillm.pool.ask import PooledAttention
from infinillm.pool.borrow import Lenders
from infinillm.pool.memory import Memory
from infinillm.telemetry import Metrics, log

RETRY_SECONDS = 0.25  # between two wishes to borrow that were refused
MOST_FAILED = 3  # passes in a row that may raise
MOST_ADMITTED = 8  # sequences in one step
KEPT_PLACEMENTS = 256


class Engine:
    """See the theory of operation above.

    publish  called with the outputs of a step, from the engine's thread
    borrow   called with (least, wanted) blocks, and the request that waits for them where nothing else
             runs; answers later with a Borrowed message
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
        borrow: Callable[[int, int, Request | None], None],
        metrics: Metrics,
    ):
        self.node, self.runner, self.memory, self.lenders, self.budget = node, runner, memory, lenders, budget
        self.publish, self.borrow, self.metrics = publish, borrow, metrics
        self.attend = PooledAttention(node, memory, lenders, metrics)
        self.moves = Moves(node, memory, lenders, budget.moves, metrics)
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.sequences: dict[SeqId, Sequence] = {}
        self.names: dict[SeqId, list[bytes]] = {}
        self.prompts: dict[SeqId, dict[int, TokenLogprob]] = {}
        self.load = Load()
        self.finished: dict[SeqId, tuple[int, Layout]] = {}
        self.failure: BaseException | None = None
        self._step = 0
        self._failed = 0  # passes in a row that raised
        self._again: tuple[Grow, ...] = ()  # what nodes of a failed pass may not have heard
        self._asking = False
        self._ask_again = 0.0
        self._denied = False
        self._stopping = False
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
            for sequence in self.moves.repay(self.running):
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
        self._failed = 0
        self._again = ()
        self.moves.switch(self.sequences, self.names)
        outputs = self.append(step, sampled, prompts)
        self._count(step, time.monotonic() - began)
        self._tell_load(step)
        self.publish(outputs)
        return True

    def decide(self) -> Step:
        """The next step. The caller holds the locks of memory and lenders."""
        self._step += 1
        waiting = self.waiting[:MOST_ADMITTED]
        matches = {sequence.id: self._match(sequence) for sequence in waiting}
        room = {self.node: self.memory.blocks.room, **self.lenders.room()}
        patient = not self._denied
        return schedule(self._step, self.running, waiting, room, self.budget, matches=matches, patient=patient)

    def commit(self, step: Step) -> None:
        """The only place where a decision changes sequences and books. The caller still holds the locks."""
        size = self.budget.block_size
        for seq in step.preempt:
            self._preempt(self.sequences[seq])
        for seq in step.admit:
            sequence = self.sequences[seq]
            start = next(chunk.start for chunk in step.chunks if chunk.seq == seq)
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.pass_through("admit")
            sequence.cached = start if not sequence.preemptions else sequence.cached
            if start:
                self.memory.blocks.share(seq, self.names[seq][: start // size])
                sequence.done = ((0, start),)
                sequence.layout = (Span(self.node, 0, start),)
                self.metrics.add("prompt_tokens_cached_total", start)
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
            sequence.compute(chunk)
            self._seal(sequence, chunk.start, chunk.stop)
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
            reason, stop = _finish_reason(sequence, choice.token)
            logprob = told_logprob(choice)
            outputs.append(
                Output(
                    chunk.seq,
                    (choice.token,),
                    () if logprob is None else (logprob,),
                    told,
                    reason,
                    stop,
                    sequence.cached,
                )
            )
            if reason:
                self._finish(sequence, reason)
        return outputs

    # --- what comes from outside ---------------------------------------------------------------------------------

    def hear(self, block: bool) -> None:
        """Hear every message there is; `block` waits for the first, where nothing can be computed until one comes."""
        timeout = None
        if self.sequences:
            timeout = RETRY_SECONDS if self._asking else max(self._ask_again - time.monotonic(), 0.001)
        try:
            while True:
                self._hear(self.inbox.get(block=block, timeout=timeout))
                block = False
        except Empty:
            pass

    def _hear(self, message: Message) -> None:
        match message:
            case Submit(request):
                sequence = Sequence(request, [*request.prompt, *request.already])
                self.sequences[request.id] = sequence
                self.names[request.id] = prefix_hashes(request.prompt, self.budget.block_size, request.cache_salt)
                at = next((i for i, s in enumerate(self.waiting) if s.request.arrival > request.arrival), None)
                self.waiting.insert(len(self.waiting) if at is None else at, sequence)
                self.metrics.add("prompt_tokens_total", len(request.prompt))
            case Cancel(id):
                if id in self.sequences:
                    self._finish(self.sequences[id], "cancelled")
            case Borrowed(answer, never):
                self._asking = False
                self._denied = isinstance(answer, Refused)
                self._ask_again = time.monotonic() + RETRY_SECONDS
                if isinstance(answer, Refused) and (first := self.sequences.get(never)) in self.waiting:
                    assert first is not None
                    self._finish(first, "error")
                    shrunk = f"the pool has become too small for this request since it was accepted: {answer.reason}"
                    self.publish([Output(first.id, error=Unavailable(shrunk))])
            case MoveBlocks():
                self.moves.hear(message, self.sequences.get(message.seq))
            case Stop():
                self._stopping = True

    def _wish(self, step: Step) -> None:
        """Ask for the blocks the step was short of; a little more for sequences that keep growing."""
        if not step.short:
            self._denied = False
            return
        if self._asking or time.monotonic() < self._ask_again:
            return
        size = self.budget.block_size
        growing = [*self.running, *self.waiting[:1]]
        coming = sum(-(-(s.request.longest - s.length) // size) for s in growing)
        self._asking = True
        alone = self.waiting[0].request if self.waiting and not self.running else None
        self.borrow(step.short, step.short + min(coming, 64), alone)

    # --- ends ----------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, reason: str) -> None:
        computed = sum(stop - start for start, stop in sequence.done)
        self.finished[sequence.id] = (computed, filled(sequence.layout, computed))
        while len(self.finished) > KEPT_PLACEMENTS:
            del self.finished[next(iter(self.finished))]
        self._release(sequence.id)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.pass_through("finish")
        del self.sequences[sequence.id], self.names[sequence.id]
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
        for sequence in self.running:
            sequence.layout, gone = without(sequence.layout, lost.node)
            for span in gone:
                sequence.lose(span.start, span.stop)

    # --- small things --------------------------------------------------------------------------------------------

    def _match(self, sequence: Sequence) -> Match:
        size = self.budget.block_size
        if sequence.request.sampling.prompt_logprobs is not None:
            return Match()  # they need every position computed
        names = self.names[sequence.id][: (sequence.length - 1) // size]
        found, idle = self.memory.blocks.match(names)
        return Match(found * size, idle)

    def _seal(self, sequence: Sequence, start: int, stop: int) -> None:
        size, names = self.budget.block_size, self.names[sequence.id]
        for i in range(start // size, min(stop // size, len(names))):
            with self.memory.lock:
                self.memory.blocks.seal(sequence.id, i * size, names[i])

    def _count(self, step: Step, seconds: float) -> None:
        m = self.metrics
        m.add("steps_total")
        m.observe("step_seconds", seconds)
        m.observe("step_tokens", sum(c.stop - c.start for c in step.chunks))
        local = remote = 0
        for chunk in step.chunks:
            if (sequence := self.sequences.get(chunk.seq)) is None:
                continue
            for span in sequence.layout:
                seen = max(0, min(span.stop, chunk.stop) - span.start)
                local, remote = (local + seen, remote) if span.node == self.node else (local, remote + seen)
        m.add("attention_tokens_total", local, place="local")
        m.add("attention_tokens_total", remote, place="remote")

    def _tell_load(self, step: Step) -> None:
        size = self.budget.block_size
        wanted = sum(need(s, size) for s in self.waiting)
        layouts = {s.id: filled(s.layout, s.length) for s in self.running}
        self.load = Load(len(self.running), len(self.waiting), wanted, layouts)

    def placement(self, id: SeqId) -> tuple[str, int, Layout] | None:
        """State, tokens and spans of a request that runs here or ended here not long ago."""
        if (sequence := self.sequences.get(id)) is not None:
            return sequence.state, sequence.length, filled(sequence.layout, sequence.length)
        if id in self.finished:
            return FINISHED, *self.finished[id]
        return None


def _finish_reason(sequence: Sequence, token: int) -> tuple[str, int | None]:
    request, sampling = sequence.request, sequence.request.sampling
    if sequence.produced >= sampling.min_tokens:
        if token in sampling.stop_token_ids:
            return "stop", token
        if token in request.eos_ids and not sampling.ignore_eos:
            return "stop", token
    return ("length", None) if sequence.produced >= sampling.max_tokens else ("", None)
