"""The native engine: continuous batching in this process, each prompt run once for its group."""

import asyncio
import functools
import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from groupwise.errors import RunError, UserError, is_out_of_memory
from groupwise.memory import give_unused_back
from groupwise.models import LanguageModel
from groupwise.models.blocked_weights import BlockedWeights
from groupwise.rollouts.base import Request, Sampling
from groupwise.rollouts.drawing import Drawing
from groupwise.rollouts.jobs import TOKENS_AT_ONCE, Job, Kept, KeptCompletions, at_once, completions
from groupwise.rollouts.rows import RandomNumbers, RowTable
from groupwise.types import Completion


class NativeSampler:
    """A `Sampler` for any Hugging Face causal language model, in this process.

    Requests share a batch whatever their lengths and sampling parameters, and new ones are admitted as rows finish (continuous
    batching). Decoding runs in the caller's asyncio event loop, and other coroutines run between two steps.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any,
        *,
        dtype: torch.dtype | None = None,
        cache_dtype: torch.dtype | None = None,
        max_rows: int = 1024,
    ) -> None:
        """
        Args:
            dtype: generate in it, see `LanguageModel.in_dtype`; None: in the model's.
            cache_dtype: of keys and values; None: the dtype of what generates.
            max_rows: rows generated at once.

        Raises:
            UserError: the model generates on a cache of transformers, which has no dtype of its own.
        """
        self.model, self.tokenizer, self.version = model.in_dtype(dtype), tokenizer, 0
        self.asked_rows = self.max_rows = max_rows
        self._cache_dtype = None if cache_dtype == self.model.dtype else cache_dtype
        if self._cache_dtype is not None and (reason := self.model.why_not_decoding(cache_dtype)):
            raise UserError(
                f"keys and values cannot be kept in another dtype: the model generates on a cache of its own: {reason}"
            )
        self._numbers = RandomNumbers()
        self._waiting: list[Job] = []
        self._running: dict[int, Job] = {}
        """Slot -> the job of each row being generated."""
        self._active: set[Job] = set()
        """The jobs of these rows."""
        self._engine: asyncio.Task[None] | None = None
        self._kept = KeptCompletions(self.model.device)
        self._open = asyncio.Event()
        """Set while decoding steps may run."""
        self._open.set()
        self._steps = itertools.count()
        self._step = 0
        self._blocked: BlockedWeights | None = None
        self._cache: Any = None
        self._reset()

    # --- the contract

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        """The request's completions, in order.

        Raises:
            ValueError: the prompt has no token, or n or max_tokens is below 1.
            UserError: prompt and completion may be longer than the model is exact for.
            RunError: the model's logits are not finite.
        """
        if len(request.prompt) == 0 or request.n < 1 or request.sampling.max_tokens < 1:
            raise ValueError("a request needs a prompt of at least one token, n and max_tokens of at least 1")
        self.model.decoder.check_length(len(request.prompt) + request.sampling.max_tokens)
        loop = asyncio.get_running_loop()
        self._check_loop(loop)
        n, T = request.n, request.sampling.max_tokens
        uniforms = self._numbers.uniforms(request.seed, request.offset, n * T).view(n, T)
        job = Job(request, loop.create_future(), self._step, self._drawing(request.sampling), uniforms)
        self._waiting.append(job)
        if self._engine is None or self._engine.done():
            self._engine = loop.create_task(self._run())
        return await job.future

    @torch.no_grad()
    def load(self, weights: LanguageModel, version: int) -> None:
        """Sample from these weights from now on.

        Requests in flight go on with the new weights: before the next step the keys and values of all their tokens are computed
        anew. What was kept for continuation is dropped.
        """
        self.version = version
        if self.model is not weights:
            self.model.copy_weights_from(weights)
        self._kept.clear()
        self._blocked = None  # copied anew from the new weights
        self._stale = self._cache is not None
        for job in self._active:
            job.versions.append((version, self._table.lengths_B[job.slots].clone()))

    def pause(self) -> None:
        """Run no decoding step until `resume`; requests wait."""
        self._open.clear()

    def resume(self) -> None:
        """Go on with every request."""
        self._open.set()

    def health(self) -> dict[str, float]:
        return {
            "version": float(self.version),
            "waiting": float(len(self._waiting)),
            "rows": float(len(self._running)),
            "kept": float(len(self._kept)),
            "steps": float(self._step),
        }

    # --- the engine

    def _check_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """One event loop at a time; what an earlier one left behind when it was closed is forgotten.

        Raises:
            RuntimeError: requests of another event loop are under way.
        """
        if self._engine is None or self._engine.done() or self._engine.get_loop() is loop:
            return
        if not self._engine.get_loop().is_closed():
            raise RuntimeError("this sampler generates in another event loop; use one sampler for each")
        self._engine = None
        self._reset()

    async def _run(self) -> None:
        """Steps until nothing is left to do; an exception fails every pending request."""
        try:
            while self._waiting or self._running:
                await self._open.wait()
                if not self._fits():
                    self._begin_again()
                await asyncio.sleep(0)
        except BaseException as error:
            for job in {*self._waiting, *self._active}:
                if not job.future.done():
                    job.future.set_exception(error) if isinstance(error, Exception) else job.future.cancel()
            if not isinstance(error, Exception):
                raise
        finally:
            self._reset()

    def _reset(self) -> None:
        """Forget all rows and give their memory back."""
        self._waiting.clear()
        self._running.clear()
        self._active.clear()
        self._cache = self._blocked = None
        self._stale = False
        """Whether keys and values of rows under way are of earlier weights."""
        self._repeated = 0
        """Prompts that the cache has more than there are jobs, since a job's rows were cut into parts."""
        self._affordable_rows = 0.0
        self._load = 0, 0
        """Rows and requests that were admitted last, with those under way."""
        self._table = RowTable(self.model.device)
        self._drawings: dict[Sampling, Drawing] = {}
        device = self.model.device
        self._slots_R = torch.zeros(0, dtype=torch.long, device=device)
        """The table's slot of each row being generated, in the order of the cache."""
        self._hidden_RH = torch.zeros(0, 0, dtype=self.model.dtype, device=device)

    def _fits(self) -> bool:
        """Advance; False if memory does not suffice for so many rows.

        Raises:
            RunError: it does not suffice for a single request.
        """
        try:
            self._advance()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            for job in self._active:
                self._kept.drop(job.handles.values())  # made again with the rows
            rows, jobs = self._load
            if jobs <= 1 and not len(self._kept):
                raise RunError(
                    f"out of memory with one prompt and its {rows} completions: a smaller rollouts.group_size or "
                    "rollouts.max_tokens, or rollouts.cache_dtype = 'bfloat16', take less"
                ) from error
            return False
        return True

    def rows(self) -> dict[str, int]:
        """How many rows it was asked to generate at once, and how many memory has sufficed for."""
        return {"asked": self.asked_rows, "rows": self.max_rows}

    def load_rows(self, rows: dict[str, int]) -> None:
        """Take up what memory sufficed for before a resume, unless the recipe asks for another number now."""
        if rows["asked"] == self.asked_rows:
            self.max_rows = rows["rows"]

    def _begin_again(self) -> None:
        """Forget all rows, and begin again: without what was kept of finished completions, or, if there was nothing, with half as
        many rows at once from now on. A request's random numbers are its own, so that its completions do not change."""
        jobs = sorted({*self._waiting, *self._active}, key=lambda job: job.arrived)
        (rows, _), drawings = self._load, self._drawings
        if len(self._kept):
            self._kept.clear()
        else:
            self.max_rows = max(1, min(self.max_rows, rows) // 2)
        self._reset()
        self._drawings = drawings
        give_unused_back()
        for job in jobs:
            job.slots, job.left, job.versions, job.handles = [], 0, [], {}
        self._waiting = [job for job in jobs if not job.future.done()]

    def _advance(self) -> None:
        """Admit what fits, draw a token for each row, deliver what is finished, run the others one token further."""
        self._step = next(self._steps)
        if self._blocked is None:
            self._blocked = self.model.blocked_weights()
        with torch.inference_mode(), self._blocked:
            self._drop_cancelled()
            if self._stale:
                self._recompute()
            self._admit()
            if len(self._slots_R) == 0:
                return
            tokens_R, done_R = self._draw()
            if done_R.any():
                self._finish(done_R)
                order_R = self._cache.keep(~done_R)
                self._slots_R, tokens_R = self._slots_R[order_R], tokens_R[order_R]
            self._hidden_RH = self._cache.step(tokens_R) if len(self._slots_R) else self._hidden_RH[:0]

    def _drop_cancelled(self) -> None:
        self._waiting = [job for job in self._waiting if not job.future.cancelled()]
        cancelled = {job for job in self._active if job.future.cancelled()}
        if not cancelled:
            return
        self._active -= cancelled
        keep_R = torch.tensor([self._running[slot] not in cancelled for slot in self._slots_R.tolist()], device=self.model.device)
        order_R = self._cache.keep(keep_R)
        self._slots_R, self._hidden_RH = self._slots_R[order_R], self._hidden_RH[order_R]
        for job in cancelled:
            for slot in job.slots:
                self._running.pop(slot, None)
            self._table.give_back(job.slots)
            self._kept.drop(job.handles.values())

    def _admit(self) -> None:
        """Prefill as many waiting requests as fit, in order of arrival; of those that came at once, the shortest prompt first.

        A request that is over the limit by itself runs alone.
        """
        if not self._waiting or (len(self._slots_R) and not self._cache.joins):
            return
        self._waiting.sort(key=lambda job: (job.arrived, len(job.request.prompt)))
        tokens = max(job.request.sampling.max_tokens for job in self._waiting)
        if self._cache is None:  # asked before the cache takes its memory
            self._affordable_rows = self.model.affordable_rows(tokens, self._cache_dtype)
        most_rows = int(min(self.max_rows, self._affordable_rows))
        most_prompts = max(1, most_rows // max(job.request.n for job in self._waiting))
        rows, prompts = len(self._slots_R), len(self._active)
        admitted: list[Job] = []
        for job in self._waiting:
            fits = rows + job.request.n <= most_rows and prompts < most_prompts
            if not fits and rows:
                break
            admitted.append(job)
            rows, prompts = rows + job.request.n, prompts + 1
        if admitted:
            self._load = rows, prompts
            self._reserve(admitted, rows, prompts, most_rows, most_prompts)
            self._prefill(admitted)
            self._waiting = self._waiting[len(admitted) :]  # only now: what fails in prefill is still pending

    def _reserve(self, admitted: list[Job], rows: int, prompts: int, most_rows: int, most_prompts: int) -> None:
        """Buffers for these rows and prompts; at first for all that wait and may run at once, so that they seldom grow."""
        everyone = [*self._waiting, *self._active]
        longest = max(len(job.request.prompt) for job in everyone)
        tokens = max(job.request.sampling.max_tokens for job in everyone)
        all_rows = sum(job.request.n for job in self._waiting) + len(self._slots_R)
        rows, prompts = max(rows, min(all_rows, most_rows)), max(prompts, min(len(everyone), most_prompts))
        if self._cache is None:
            self._cache = self.model.decoding_cache(prompts, longest, rows, tokens, dtype=self._cache_dtype)
        self._cache.reserve(prompts + self._repeated, longest, rows, tokens)
        self._table.reserve(sum(job.request.n for job in admitted), tokens)

    def _prefill(self, admitted: list[Job]) -> None:
        """Prefill new requests; of those that continue a kept completion, only the tokens after its cached prefix."""
        device = self.model.device
        kept = {job: found for job in admitted if self._cache.continues and (found := self._kept.take(job.request)) is not None}
        fresh, continued = [job for job in admitted if job not in kept], list(kept)
        parts = [self._hidden_RH] if len(self._hidden_RH) else []
        for jobs in (fresh, continued):
            if not jobs:
                continue
            counts = [job.request.n for job in jobs]
            prompts = [job.request.prompt.to(device) for job in jobs]
            if jobs is fresh:
                hidden_PH = self._cache.prefill(prompts, counts)
            else:
                suffixes = [prompt[len(kept[job].prefix) :] for job, prompt in zip(jobs, prompts, strict=True)]
                hidden_PH = self._cache.extend([kept[job].prefix for job in jobs], suffixes, counts)
            parts.append(hidden_PH.repeat_interleave(torch.tensor(counts, device=device), dim=0))
            for job in jobs:
                self._take_slots(job)
        self._hidden_RH = torch.cat(parts)

    def _recompute(self) -> None:
        """Compute the keys and values of all rows under way anew, from their prompts and what they have written so far: with half
        as many tokens at once where memory does not suffice."""
        jobs, most = list(dict.fromkeys(self._running[slot] for slot in self._slots_R.tolist())), TOKENS_AT_ONCE
        while not self._restored(at_once(jobs, self._running, self._table, most)):
            most //= 2
            give_unused_back()
        self._stale = False

    def _restored(self, parts: list[list[tuple[Job, list[int]]]]) -> bool:
        """Compute parts one after the other; False if memory does not suffice, and parts can be smaller."""
        self._cache.clear()
        pieces, hidden = [piece for part in parts for piece in part], [self._hidden_RH[:0]]
        try:
            self._repeated = len(pieces) - len({job for job, _ in pieces})
            self._cache.reserve(len(pieces), 0, 0, 0)
            for part in parts:
                prompts = [job.request.prompt.to(self.model.device) for job, _ in part]
                hidden.append(self._cache.restore(prompts, [[self._table.tokens(slot) for slot in slots] for _, slots in part]))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(parts) == len(self._slots_R):
                raise
            return False
        order = [slot for _, slots in pieces for slot in slots]
        self._hidden_RH, self._slots_R = torch.cat(hidden), self._slots_R.new_tensor(order)
        return True

    def _take_slots(self, job: Job) -> None:
        n = job.request.n
        job.slots, job.left = self._table.take(job.uniforms), n
        job.versions = [(self.version, torch.zeros(n, dtype=torch.long))]
        self._running |= dict.fromkeys(job.slots, job)
        self._active.add(job)
        self._slots_R = torch.cat([self._slots_R, torch.tensor(job.slots, device=self._slots_R.device)])

    def _draw(self) -> tuple[Tensor, Tensor]:
        """A token for each row, written to the table; and which rows are done."""
        slots_R, table = self._slots_R, self._table
        drawings = [self._running[slot].drawing for slot in slots_R.tolist()] if len(self._drawings) > 1 else []
        if len(set(drawings)) <= 1:
            return self._draw_with(drawings[0] if drawings else next(iter(self._drawings.values())), slots_R, self._hidden_RH)
        tokens_R, done_R = torch.zeros_like(slots_R), torch.zeros(len(slots_R), dtype=torch.bool, device=table.tokens_BT.device)
        for drawing in dict.fromkeys(drawings):
            rows = torch.tensor([i for i, other in enumerate(drawings) if other is drawing], device=slots_R.device)
            tokens_R[rows], done_R[rows] = self._draw_with(drawing, slots_R[rows], self._hidden_RH[rows])
        return tokens_R, done_R

    def _draw_with(self, drawing: Drawing, slots_R: Tensor, hidden_RH: Tensor) -> tuple[Tensor, Tensor]:
        """The same, for rows that share their sampling parameters."""
        tokens_R, logprobs_R, kept = drawing.choose(hidden_RH, self._table.uniforms(slots_R))
        if kept is not None:
            self._table.kept.append(slots_R.tolist(), kept)
        tails = functools.partial(self._table.tails, slots_R, drawing.tail)
        return tokens_R, self._table.write(slots_R, tokens_R, logprobs_R, functools.partial(drawing.ended, tokens_R, tails))

    def _finish(self, done_R: Tensor) -> None:
        """Deliver the requests whose last row is done."""
        for row, slot in zip(done_R.nonzero()[:, 0].tolist(), self._slots_R[done_R].tolist(), strict=True):
            job = self._running.pop(slot)
            if job.request.keep and self._cache.continues:
                job.handles[slot] = self._keep(job, row, slot)
            job.left -= 1
            if job.left == 0:
                self._active.discard(job)
                if not job.future.done():
                    job.future.set_result(completions(job, self._table, self.tokenizer))
                self._table.give_back(job.slots)

    def _drawing(self, sampling: Sampling) -> Drawing:
        key = replace(sampling, max_tokens=1)  # rows with other limits are drawn together
        if key not in self._drawings:
            self._drawings[key] = Drawing(self.model, self.tokenizer, key)
        return self._drawings[key]

    # --- conversations

    def _keep(self, job: Job, row: int, slot: int) -> int:
        """Copy a row's keys and values, and return their handle. The newest token has not been run yet, so it has none."""
        written = self._table.tokens(slot).tolist()[:-1]
        return self._kept.add(Kept([*job.request.prompt.tolist(), *written], self._cache.prefix(row)), self.max_rows)
