#!/usr/bin/env bash
# Run the README's command as written on a 7B folder with random weights: stop by SIGTERM, resume, finish, load the export.
#   benchmarks/seed_run.sh ALPACA_JSON TOKENIZER_DIR WORK_DIR LOG_DIR [PYTHON]
# WORK_DIR needs 45 GB of disk; checkpoints (81 GB) go to a tmpfs where the disk is smaller.
set -u
data=$1 tokenizer=$2 work=$3 logs=$4 python=${5:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$work" "$logs"
clock() { echo "[$(date +%T)] $*"; }

clock "making the model"
$python benchmarks/make_model.py --shape llama-7b --output_dir "$work/llama_7b_hf_weight" --tokenizer "$tokenizer" || exit
du -sh "$work/llama_7b_hf_weight"

seed() { # OUTPUT_DIR [further flags]
  local out=$1; shift
  $python train_jax.py \
    --model_name_or_path "$work/llama_7b_hf_weight" \
    --data_path "$data" \
    --bf16 True \
    --output_dir "$out" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 2000 \
    --save_total_limit 1 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --tf32 True \
    --report_to "none" \
    --loggingdir ./log "$@"
}
wait_for() { # LOG COUNT PID: until the log has so many updates
  while kill -0 "$3" 2>/dev/null && [ "$(grep -c "'loss'" "$1")" -lt "$2" ]; do sleep 0.5; done
}

out=$work/output
if [ "$(df --output=avail -BG "$work" | tail -1 | tr -dc 0-9)" -lt 120 ]; then
  out=$work/tmpfs; mkdir -p "$out"; mount -t tmpfs -o size=100G tmpfs "$out" && out=$out/output
fi
clock "the command as written, stopped after 40 updates"
seed "$out" >"$logs/run1.log" 2>"$logs/run1.err" & pid=$!
wait_for "$logs/run1.log" 40 $pid; clock "SIGTERM"; pkill -TERM -P $pid; wait $pid; clock "exit code $?"
du -sh "$out"; ls "$out"; free -g | head -2
clock "resumed, for 10 updates"
seed "$out" --resume_from_checkpoint True >"$logs/run2.log" 2>"$logs/run2.err" & pid=$!
wait_for "$logs/run2.log" 10 $pid; pkill -KILL -P $pid; wait $pid 2>/dev/null; clock "killed"
rm -rf "$out"; umount "$work/tmpfs" 2>/dev/null
clock "32 updates to the end, and the export"
seed "$work/final" --max_steps 32 >"$logs/run3.log" 2>"$logs/run3.err"; clock "exit code $?"
ls -la "$work/final"
$python - "$work/final" <<'PY'
import sys, time, torch, transformers
start = time.time()
model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True, dtype=torch.bfloat16)
print({k: len(v) for k, v in info.items()}, model.config.vocab_size, f"{time.time() - start:.0f} s")
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
print(len(tokenizer), tokenizer.pad_token, tokenizer.pad_token_id)
PY
clock done
