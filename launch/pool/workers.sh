#!/usr/bin/env bash
# One SGLang server per GPU of this host, and one agent that copies weights for all of them.
#
#   MODEL=Qwen/Qwen3-4B WORKERS=8 SOURCE=gs://bucket/weights bash launch/pool/workers.sh
#
# Ends, and ends all others, as soon as one of them does: whoever started it starts it again.
# SGLANG_API_KEY and SGLANG_ADMIN_API_KEY, where set, become the keys of every server; the agent
# wants one of them, unless HOST is 127.0.0.1.
set -euo pipefail

MODEL=${MODEL:?name the model: a Hugging Face name or directory}
WORKERS=${WORKERS:-$(nvidia-smi --list-gpus | wc -l)} # servers on this host
GPUS_EACH=${GPUS_EACH:-1}                             # tensor parallelism of each
HOST=${HOST:-0.0.0.0}
PORT=${PORT:-30000}                                   # of the first; the others follow
CONTEXT=${CONTEXT:-32768}                             # tokens, prompt and completion
SOURCE=${SOURCE:-}                                    # the trainer's pool.weights_dir; empty: a shared disk
DIRECTORY=${DIRECTORY:-/tmp/weights}                  # on a local disk
AGENT_PORT=${AGENT_PORT:-30900}                       # the trainer's pool.agent_port
QUOTA_GB=${QUOTA_GB:-0}
PYTHON=${PYTHON:-python3}
read -ra flags <<<"${SGLANG_FLAGS:-}"                 # further ones of sglang.launch_server

here=$(cd "$(dirname "$0")/.." && pwd)
# SGLang has no environment variables for keys, and everybody reads a command line: a file of ours.
scratch=$(mktemp -d)
: >"$scratch/keys.yaml"
[[ -z ${SGLANG_API_KEY:-} ]] || echo "api-key: '$SGLANG_API_KEY'" >>"$scratch/keys.yaml"
[[ -z ${SGLANG_ADMIN_API_KEY:-} ]] || echo "admin-api-key: '$SGLANG_ADMIN_API_KEY'" >>"$scratch/keys.yaml"

finish() {
  trap - TERM INT EXIT
  jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true
  wait || true
  rm -rf "$scratch"
}
trap finish EXIT
trap 'exit 143' TERM INT

if [[ -n $SOURCE ]]; then
  "$PYTHON" "$here/pool_agent.py" --source="$SOURCE" --directory="$DIRECTORY" --host="$HOST" \
    --port="$AGENT_PORT" --quota-gb="$QUOTA_GB" &
fi
for ((worker = 0; worker < WORKERS; worker++)); do
  first=$((worker * GPUS_EACH))
  CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + GPUS_EACH - 1))) \
    "$PYTHON" -m sglang.launch_server --model-path "$MODEL" --host "$HOST" \
    --port $((PORT + worker)) --tp-size "$GPUS_EACH" --context-length "$CONTEXT" \
    --config "$scratch/keys.yaml" "${flags[@]}" &
done
wait -n || true
echo "a server or the agent ended; ending the others" >&2
exit 1
