"""Read the weights and the optimizer of an HF Trainer's checkpoint into the arrays of this program's checkpoints."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from optax import FactoredState, ScaleByAdamState, ScaleByLionState

from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.hf import peft
from llama_jax.hf.load import check_tensors, load_params, place_arrays
from llama_jax.hf.names import Path, name_table, without_layer
from llama_jax.hf.readers import open_checkpoint
from llama_jax.hf.tensor import Tensor
from llama_jax.hf.trainer_checkpoint import ADAMW_32, OPTIMIZER, TrainerCheckpoint, anew, parameter_order
from llama_jax.model.roles import Params, is_stacked
from llama_jax.plan.planner import Planner
from llama_jax.setup.job import Job
from llama_jax.training.eight_bits import BLOCK, Quantized, code_book
from llama_jax.training.moments import StoredAdamState
from llama_jax.training.optimizer import ClipState
from llama_jax.training.state import SavedState

_NODES = (ClipState, ScaleByAdamState, StoredAdamState, FactoredState, ScaleByLionState)


class TrainersState:
    """Read the arrays of an HF Trainer's checkpoint for a job. Raises InputError where they are not the job's.

    Only adapters, Adafactor's and 8-bit states pass whole through the host's memory; other tensors pass one at a time.
    """

    def __init__(self, checkpoint: TrainerCheckpoint, job: Job, planner: Planner, mesh: Mesh):
        self._checkpoint, self._job, self._planner, self._mesh = checkpoint, job, planner, mesh
        self._lora = job.adapter.lora if job.adapter else None
        table = peft.name_table(self._lora, job.config) if self._lora else name_table(job.config)
        self._order = parameter_order(job.config, self._lora)
        self._shapes = {name: table[name][1] for name, _ in self._order}
        self._path = str(checkpoint.folder / OPTIMIZER)
        self._weights, self._values, self._steps = self._open_weights(), self._by_name(), checkpoint.steps
        self._adam = ("state1", "state2") if checkpoint.optim == ADAMW_32 else ("exp_avg", "exp_avg_sq")
        for key in {"adamw_torch": self._adam, "lion_32bit": ("state1",)}.get(job.args.optim, ()):
            self._all(key)

    def read(self) -> SavedState:
        """Return the state after the checkpoint's updates. Raises InputError."""
        self._count = sharding.put_scalar(self._mesh, np.int32(self._steps))
        abstract = self._planner.saved
        opt_state = jax.tree.map(self._fill, abstract.opt_state, is_leaf=lambda node: isinstance(node, _NODES))
        step = sharding.put_scalar(self._mesh, np.int32(self._checkpoint.updates))
        return SavedState(step, self._place(self._weights, abstract.params), opt_state)

    def _open_weights(self) -> dict[str, Tensor]:
        folder, job = self._checkpoint.folder, self._job
        if self._lora:
            return peft.read_adapter(folder, job.config, job.args.allow_nonfinite)[1]
        tensors = open_checkpoint(folder, job.args.allow_pickle).tensors
        return check_tensors(tensors, job.config, str(folder), job.args.allow_nonfinite)

    def _by_name(self) -> dict[str, dict[str, Any]]:
        """Return the optimizer's tensors by the names of parameters, which the Trainer deals to two groups: those with
        weight decay, and those without."""
        return dict(self._checkpoint.by_name(*deal(self._order, self._planner.decayed)))

    def _place(self, tensors: dict[str, Tensor], like: Params) -> Params:
        """Place tensors, by the names of all trained parameters, in a tree like theirs."""
        if self._lora:
            return self._place_arrays({path: tensors[name].read(()) for name, path in self._order}, like)
        placed = load_params(tensors, self._job.config, self._planner.run, like, self._mesh)
        return self._moved(placed, like)

    def _place_arrays(self, arrays: dict[Path, np.ndarray], like: Params) -> Params:
        return self._moved(place_arrays(arrays, like)[0], like)

    @staticmethod
    def _moved(placed: Params, like: Params) -> Params:
        """Return arrays in the memory of `like`, perhaps the host's."""
        return jax.tree.map(lambda x, target: jax.device_put(x, target.sharding), placed, like)

    def _tensor(self, name: str, key: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor of a parameter's state. Raises InputError where it is missing or of another shape."""
        found = self._values[name].get(key)
        if not isinstance(found, Tensor) or found.shape != shape:
            is_ = [*found.shape] if isinstance(found, Tensor) else "missing"
            raise InputError(
                f"{self._path}: {key} of {name} is {is_}, should be {[*shape]}: give the model and the adapter flags "
                "of then, or copy the file again"
            )
        return found

    def _all(self, key: str) -> dict[str, Tensor]:
        return {name: self._tensor(name, key, shape) for name, shape in self._shapes.items()}

    def _fill(self, node: Any) -> Any:
        """Return a part of optax's state with the checkpoint's values."""
        if isinstance(node, ClipState):
            return ClipState(sharding.put_scalar(self._mesh, np.float32(0)))
        if isinstance(node, FactoredState):
            return self._factored(node)
        if isinstance(node, ScaleByLionState):
            return ScaleByLionState(self._count, self._place(self._all("state1"), node.mu))
        if self._job.args.optim == "adamw_8bit" and isinstance(node, StoredAdamState):
            return StoredAdamState(self._count, self._quantized(node.mu, "1"), self._quantized(node.nu, "2"))
        if isinstance(node, ScaleByAdamState | StoredAdamState):
            first, second = map(self._all, self._adam)
            mu, nu = self._place(first, node.mu), self._place(second, node.nu)
            return node._replace(count=self._count, mu=mu, nu=nu)
        return node

    def _factored(self, node: FactoredState) -> FactoredState:
        """Return Adafactor's moments: of a matrix the means of its rows and columns, of a vector the whole.

        optax names them by length: `v_row` keeps the shorter axis, of equal ones the first. Its means are over the
        mesh's padding too.
        """
        parts: list[dict[Path, np.ndarray]] = [{}, {}, {}]
        for name, path in self._order:
            shape, padded, one = (
                self._shapes[name],
                leaf_at(self._planner.saved.params, path).shape,
                np.zeros(1, np.float32),
            )
            if len(shape) == 1:
                arrays = [one, one, self._tensor(name, "exp_avg_sq", shape).read(())]
            else:
                axes = np.argsort(padded).tolist()
                means = [self._tensor(name, f"exp_avg_sq_{('row', 'col')[a]}", (shape[a],)).read(()) for a in axes]
                shares = [np.float32(shape[a] / padded[a]) for a in reversed(axes)]
                arrays = [means[0] * shares[0], means[1] * shares[1], one]
            for part, array in zip(parts, arrays, strict=True):
                part[path] = array
        trees = (node.v_row, node.v_col, node.v)
        return FactoredState(self._count, *map(self._place_arrays, parts, trees))

    def _quantized(self, like: Params, number: str) -> Params:
        """Return the first or the second of Adam's moments in 8 bits; of small tensors and embeddings in 32."""

        def is_leaf(node: Any) -> bool:
            return isinstance(node, Quantized)

        wanted = jax.tree.map(is_leaf, like, is_leaf=is_leaf)
        codes, scales = {}, {}
        for name, path in self._order:
            shape = self._shapes[name]
            codes[path] = self._tensor(name, f"state{number}", shape).read(())
            node = leaf_at(wanted, path)
            if (codes[path].dtype == np.uint8) != node:
                bits = "32 bits, in this run 8" if node else "8 bits, in this run 32"
                raise InputError(f"{self._path}: state{number} of {name} is in {bits}: give the --hf_compat of then")
            scales[path] = self._absmax(name, number, shape) if node else np.zeros((), np.float32)
        whole = jax.tree.map(lambda node: node.codes if is_leaf(node) else node, like, is_leaf=is_leaf)
        scalar = sharding.put_scalar(self._mesh, np.float32(0))
        parts = jax.tree.map(lambda node: node.absmax if is_leaf(node) else scalar, like, is_leaf=is_leaf)
        whole, parts = self._place_arrays(codes, whole), self._place_arrays(scales, parts)
        return jax.tree.map(lambda eight, x, scale: Quantized(x, scale) if eight else x, wanted, whole, parts)

    def _absmax(self, name: str, number: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the largest magnitudes of a tensor's blocks, in the form of `eight_bits.divide`. Raises InputError for
        another code or other blocks."""
        blocks = -(-math.prod(shape) // BLOCK)
        book = self._tensor(name, f"qmap{number}", (256,)).read(())
        found = self._values[name].get(f"absmax{number}")
        if isinstance(found, Tensor) and found.shape != (blocks,):
            raise InputError(
                f"{self._path}: {name} is kept in other blocks than of {BLOCK}, as bitsandbytes before 0.45 has them; "
                f"{anew(self._checkpoint.folder)}"
            )
        if not np.allclose(book, code_book(number == "1"), rtol=1e-6, atol=0):
            raise InputError(f"{self._path}: qmap{number} of {name} is not bitsandbytes' dynamic code; copy it again")
        absmax = self._tensor(name, f"absmax{number}", (blocks,)).read(())
        return absmax if shape[-1] % BLOCK else absmax.reshape(*shape[:-1], -1)


def deal(order: list[tuple[str, Path]], decayed: Params) -> tuple[list[str], list[str]]:
    """Return the names of the Trainer's two groups of parameters, with weight decay and without, each in order.

    `decayed` is a tree of booleans over the parameters."""
    groups: tuple[list[str], list[str]] = ([], [])
    for name, path in order:
        groups[0 if leaf_at(decayed, path) else 1].append(name)
    return groups


def leaf_at(tree: Params, path: Path) -> Any:
    """Return the leaf at a path of the unstacked tree; of stacked layers, the leaf of all."""
    node: Any = tree
    for key in without_layer(path) if is_stacked(tree) else path:
        node = node[key]
    return node
