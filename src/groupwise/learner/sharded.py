"""The learner over several processes, which torchrun starts: FSDP2 slices weights, gradients and moments over them.

All processes run the same `ShardedLearner` on the same batches, each its own rows. Process 0 leads: what its `Leader` is asked
for, the others, which `follow`, do at the same time.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from groupwise.algorithms import Algorithm
from groupwise.errors import UserError
from groupwise.files import Digest, sync
from groupwise.learner.following import Leader, by_itself, explained, follow, give_up, is_lost
from groupwise.learner.local import LocalLearner
from groupwise.learner.processes import ManyRanks
from groupwise.models import LanguageModel, checkpoint, export, published
from groupwise.models.sharding import full, gathered
from groupwise.models.shards import Stored, write_shards
from groupwise.state import encode, read_state, write_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from groupwise.config import Recipe


class ShardedLearner(LocalLearner):
    """One process's part of a learner that is sharded over several. Every method is for all of them to call, in one order."""

    ranks: ManyRanks

    # --- checkpoints

    def save(self, directory: Path) -> dict[str, Digest]:
        """Write this process's slices; returns what its own files hold."""
        rank = self.ranks.rank
        with by_itself():
            text, tensors = encode(self.state_dict())
            identity, weights = self.ranks.identity(self.model), checkpoint.stored(self.model.module)
            found = write_shards(directory / "model", weights, identity, rank=rank)
            found |= write_shards(directory / "learner", tensors, rank=rank)
            for stem in ("model", "learner"):
                sync(directory / stem)
            if rank == 0:
                found |= write_text(directory / "learner.json", text)
        return found

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote, be it with another number of processes, or that of a `LocalLearner`."""
        mesh = self.ranks.mesh(self.model.device)
        with by_itself():
            stored = Stored(directory / "learner")
            state: dict[str, Any] = read_state(directory / "learner", stored.read(mesh, self._whole_in(directory, stored)))
            checkpoint.load_weights(self.model.module, directory / "model", self.ranks.identity(self.model))
            self.load_state_dict(state)

    def _whole_in(self, directory: Path, stored: Stored) -> list[str]:
        """The stored tensors that each process holds whole: the critic's buffers."""
        if self.critic is None:
            return []
        alike = stored.alike()
        theirs = read_state(directory / "learner", alike)["critic"]["network"]
        ours = self.critic.values_of.state_dict().items()
        buffers = [theirs.get(name) for name, tensor in ours if not isinstance(tensor, DTensor)]
        return [name for name, tensor in alike.items() if any(tensor is buffer for buffer in buffers)]

    # --- whole weights

    def publish(self, directory: Path) -> None:
        """See `Learner.publish`. Process 0 writes what all of them have gathered, one weight after the other."""
        with gathered(self.model.module, keep=self.ranks.rank == 0):
            if self.ranks.rank == 0:
                with by_itself():
                    published.publish(self.model, directory)

    def export(self, directory: Path, tokenizer: Any) -> dict[str, float]:
        """See `Learner.export`."""
        with torch.no_grad():  # before anything is written, which may fail on process 0
            found = self._runs[self.model](export.gap, self.model) if self.merge_adapters else {}
        with gathered(self.model.module, keep=self.ranks.rank == 0):
            if self.ranks.rank == 0:
                with by_itself():
                    export.write(self.model, directory, tokenizer, merge=self.merge_adapters)
        return found

    @torch.no_grad()
    def give_weights(self, to: LanguageModel | None = None) -> None:
        """Copy the trained weights to a model that is not sharded, on process 0 (elsewhere None)."""
        mine = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        theirs = [None] * len(mine) if to is None else [weight for weight in to.parameters() if weight.requires_grad]
        for parameter, weight in zip(mine, theirs, strict=True):
            whole = full(parameter)
            if weight is not None:
                weight.copy_(whole)


def build(recipe: "Recipe", algorithm: Algorithm, load: "Callable[[], LanguageModel]", ranks: ManyRanks | None = None) -> Leader:
    """The learner of a recipe over the processes that torchrun has started, of which this is one.

    Process 0 gets its leader, which has to be closed. The others do not return: they do what it asks for and exit as it says.

    Args:
        load: loads the policy; called once this process has its device.
        ranks: the processes, where they have met already.

    Raises:
        UserError: the model cannot be loaded, or not be sharded. The others exit with code 2.
        RunError: another process has ended meanwhile.
        SystemExit: on the other processes, when the leader is closed (with the code that it gives) or lost.
    """
    ranks = ranks or ManyRanks.join(recipe.cluster.timeout)
    learner, problem = None, ""
    try:
        try:
            learner = ShardedLearner.build(recipe, algorithm, load(), ranks)
        except UserError as error:
            problem = str(error)
        problems = [text for text in ranks.gather(problem, patient=True) if text]
    except Exception as error:  # out of memory, or a process has ended: none can go on without the others
        if ranks.rank:
            give_up(ranks, error)
        if not is_lost(error):
            raise
        raise explained(ranks, error) from error
    if problems and ranks.rank == 0:
        ranks.end(2)
        raise UserError(problems[0])
    if ranks.rank or learner is None:
        raise SystemExit(follow(learner, ranks))
    return Leader(learner, ranks)
