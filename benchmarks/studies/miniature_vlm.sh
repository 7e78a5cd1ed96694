#!/usr/bin/env bash
# The paper's Table 2 in miniature: a LLaVA model on the untouched encoder and on those that sa and
# hive pre-trained, three seeds each, on the miniature's four benchmarks.
#
#     make .venv-eval/installed
#     bash benchmarks/studies/miniature_vlm.sh
#
# Steps and rates of pre-training are those that the search of miniature.yaml chose; fine-tuning has
# half of its recipe's steps. Four to five hours of one core; what is finished is not done again,
# what was stopped goes on.
set -euo pipefail
RUNS=runs/vlm_study

encoder() { # method, seed, rate of stage 1, rate of stages 2 and 3
  hive-vision pretrain miniature "method=$1" "seed=$2" "output=$RUNS/encoders/$1-$2" \
    save_every=300 gradients_every=0 stage1.max_steps=60 stage2.max_steps=60 stage3.max_steps=480 \
    "stage1.rules={projectors: $3, cross_attentions: $3, language_model: frozen, vision_model: frozen}" \
    "stage2.rules={projectors: $4, cross_attentions: $4, language_model: $4, vision_model: frozen}" \
    "stage3.rules={projectors: $4, cross_attentions: $4, language_model: $4, vision_model: $4}"
}

vlm() { # name, seed, encoder
  hive-vision finetune vlm-miniature "seed=$2" "model.vision=$3" "output=$RUNS/$1-$2" \
    stage2.max_steps=2400
}

for seed in 0 1 2; do
  encoder hive "$seed" 4.0e-3 2.0e-3
  encoder sa "$seed" 2.0e-3 1.0e-3
  vlm base "$seed" runs/miniature/foundations/siglip
  vlm sa "$seed" "$RUNS/encoders/sa-$seed/encoder"
  vlm hive "$seed" "$RUNS/encoders/hive-$seed/encoder"
done

hive-vision evaluate --compare "base=$RUNS/base-0,$RUNS/base-1,$RUNS/base-2" \
  "sa=$RUNS/sa-0,$RUNS/sa-1,$RUNS/sa-2" "hive=$RUNS/hive-0,$RUNS/hive-1,$RUNS/hive-2" \
  data=runs/miniature/vlm/benchmarks baselines=true python=.venv-eval/bin/python \
  "output=$RUNS/evaluate"
