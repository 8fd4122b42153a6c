"""Name the part of a layer that differs: each projection, norm, attention and MLP alone, on torch's own inputs.

Letters: B examples, T tokens of the longest, R rows of this program.
"""

from functools import partial
from typing import Any

from llama_jax.proof.bounds import bound_of
from llama_jax.proof.our_layers import OurLayers
from llama_jax.proof.sample import Sample
from llama_jax.proof.torch_layers import Reference
from llama_jax.proof.walk import Walk, as_state, numpy_of, worst_token

# What is left of a part whose own parts hold.
_REST = {
    "self_attn": "self_attn, though its projections hold: rotation, mask, scale of the scores, grouping of the heads",
    "mlp": "mlp, though its projections hold: the activation",
}
_NONE = "no part alone: the sums of the residual stream"


def differing_part(reference: Reference, ours: OurLayers, sample: Sample, walk: Walk, i: int) -> str:
    """Return the name of the first part of layer i whose output differs on equal input."""
    precision, params = walk.precision, ours.read(i)
    captured: dict[str, tuple[Any, Any]] = {}

    def keep(name: str, module: Any, positional: Any, named: Any, output: Any) -> None:
        given = named["hidden_states"] if "hidden_states" in named else positional[0]
        captured[name] = given, output[0] if isinstance(output, tuple) else output

    x = reference.state(sample.to_padded(walk.shared[i]), precision)
    with reference.layer(i, precision) as layer:
        parts = [(name, part) for name, part in layer.named_modules() if name in ours.parts(i)]
        hooks = [part.register_forward_hook(partial(keep, name), with_kwargs=True) for name, part in parts]
        reference.call(layer, x, walk.arguments[precision][i], precision)
        for hook in hooks:
            hook.remove()
    with reference.layer(i, walk.exact) as layer:
        for name, (given, output) in captured.items():  # in the order in which they ended: projections before the whole
            arguments = walk.arguments[walk.exact][i] if name == "self_attn" else {}
            kind = next(layer.parameters()).dtype
            exact = reference.call(layer.get_submodule(name), given.to(kind), arguments, walk.exact)
            y, t, inputs = (sample.of_padded(numpy_of(value)) for value in (exact, output, given))
            o = sample.of_rows(ours.part(i, params, name, as_state(sample.to_rows(inputs), walk)))
            error, own, _ = worst_token(o.reshape(len(o), -1), t.reshape(len(t), -1), y.reshape(len(y), -1))
            if not error <= bound_of(precision, own, 0):
                return _REST.get(name, name)
    return _NONE
