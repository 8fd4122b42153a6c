"""Compute the logits of token ids by llama.cpp or vLLM: a program of its own, which an error in native code may end.

python -m llama_jax.proof.server_process reads a JSON object on the standard input. It has `program`, `model` (the file
or folder), `ids` (of each example), and the files to write, `logits` and `answer`. The answer has `left_out`, the
reason where the program does not compute the logits, "" where it did.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np


class LeftOut(Exception):
    """Tell why a program does not compute the logits of a model."""


def by_llama_cpp(model: str, examples: list[list[int]]) -> list[np.ndarray]:
    """Return the logits [T, V] of each example by llama.cpp on the CPU, in float32: its cache would be float16."""
    import llama_cpp

    longest = max(map(len, examples))
    log = io.StringIO()
    try:
        with contextlib.redirect_stderr(log):
            program = llama_cpp.Llama(
                model,
                n_gpu_layers=0,
                offload_kqv=False,
                op_offload=False,
                n_ctx=longest,
                n_batch=longest,
                n_ubatch=longest,
                logits_all=True,
                type_k=llama_cpp.GGML_TYPE_F32,
                type_v=llama_cpp.GGML_TYPE_F32,
            )
    except ValueError as e:  # that the file cannot be loaded; the log has the reason
        raise LeftOut(next((line for line in log.getvalue().splitlines() if "error" in line), str(e))) from None
    found = []
    for ids in examples:
        program.reset()
        program.eval(ids)
        found.append(program.scores[: len(ids)].copy())
    return found


def by_vllm(model: str, examples: list[list[int]]) -> list[np.ndarray]:
    """Return the logits [T, V] of each example by vLLM on the CPU, in float32."""
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise LeftOut("this build of vLLM is not for CPUs, where it computes in float32")
    program = vllm.LLM(
        model,
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=max(map(len, examples)) + 1,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
    )
    asked = vllm.SamplingParams(max_tokens=1, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True, detokenize=False)
    rows = program.llm_engine.model_config.get_vocab_size()
    found = []
    for ids in examples:  # one at a time: each logit is an object of Python
        (answer,) = program.generate({"prompt_token_ids": ids}, asked, use_tqdm=False)
        logits = np.full((len(ids), rows), np.nan, np.float32)
        # The first token of a prompt has no logits, and those after its last token are the answer's.
        for flat, after, first in ((answer.prompt_logprobs, 1, 0), (answer.outputs[0].logprobs, 0, len(ids) - 1)):
            for i in range(after, len(flat)):
                part = slice(flat.start_indices[i], flat.end_indices[i])
                logits[first + i - after, flat.token_ids[part]] = flat.logprobs[part]
        found.append(logits)
    return found


def main() -> None:
    """Run the program."""
    spec = json.load(sys.stdin)
    compute = {"llama.cpp": by_llama_cpp, "vLLM": by_vllm}[spec["program"]]
    try:
        np.save(spec["logits"], np.concatenate(compute(spec["model"], spec["ids"])))
        left_out = ""
    except LeftOut as e:
        left_out = str(e)
    except Exception as e:  # of many classes, by versions: what it says is in the row
        left_out = f"{type(e).__name__}: {e}".splitlines()[0]
    Path(spec["answer"]).write_text(json.dumps({"left_out": left_out}))


if __name__ == "__main__":
    main()
