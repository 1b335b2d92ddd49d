#!/usr/bin/env bash
# What pre-training is worth on real scans: the tables of the README's Results, from nothing.
#
#   bash assets/study.sh                               # left atria, 8 labels, three seeds
#   LABELS="0.1 0.2 1" DECODERS="light unetr" SEEDS="0 1 2 3 4" bash assets/study.sh
#
# 80 atria without their labels to pre-train on, a few labels to fine-tune with, 20 to test on: the
# usual split (train.list, test.list). Every part is left out where its result is there already, so
# the script can be stopped and started again. It says how long each part took.
set -euo pipefail
cd "$(dirname "$0")/.."

SEEDS=${SEEDS:-0 1 2}        # of fine-tuning; each has labels of its own
LABELS=${LABELS:-0.1}        # shares of the 80: 0.1 is 8 labels; or files with lists of names
DECODERS=${DECODERS:-light}  # light: what the encoder knows; unetr: published
STEPS=${STEPS:-1500}         # of pre-training
TUNE=${TUNE:-400}            # of fine-tuning
GRID="--spacing 1.25 1.25 1.25"

part() {  # part RESULT COMMAND…: run it where there is no RESULT yet, and say how long it took
  local result=$1 start=$SECONDS
  shift
  [ -e "$result" ] && return
  "$@"
  echo "== $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s: $result"
}

# the scans, and a corpus of the 80 that train.list names
part data/la git clone --depth 1 https://github.com/yulequan/UA-MT data/la
part data/corpus-la/index.jsonl python serialize.py --spatial data/la/data $GRID --out data/corpus-la

# slabs side by side (--stride 16 of 64 voxels), and overlapping as published (4)
for stride in 16 4; do
  part out/la/pre-$stride/metrics.json python pretrain.py --data data/corpus-la --size nano \
    --stride $stride --steps "$STEPS" --val-every 250 --out out/la/pre-$stride
  part out/la/probe-$stride/metrics.json python eval.py probe --ckpt out/la/pre-$stride/ckpt.pt \
    --layer all --tasks la $GRID --out out/la/probe-$stride
done

# from scratch, a random encoder that stays as it is, and both pre-trained ones
for seed in $SEEDS; do
  for labels in $LABELS; do
    for decoder in $DECODERS; do
      for arm in scratch frozen pre-16 pre-4; do
        case $arm in
          scratch) init="--init scratch:nano" ;;
          frozen) init="--init scratch:nano --freeze" ;;
          *) init="--init out/la/$arm/ckpt.pt --layer-decay 0.75" ;;
        esac
        run=out/la/$decoder-$(basename "$labels")/$arm-$seed
        part "$run/metrics.json" python finetune_seg.py --task la --preset nano \
          $GRID --labels "$labels" --decoder "$decoder" $init \
          --steps "$TUNE" --val-every "$TUNE" --seed "$seed" --out "$run"
        part "$run/eval-seg/metrics.json" python eval.py seg --ckpt "$run/ckpt.pt"
      done
    done
  done
done
for folder in out/la/*-*/; do
  if compgen -G "$folder*/metrics.json" > /dev/null && [ ! -e "$folder/metrics.json" ]; then
    python eval.py table "$folder" --out "$folder/table"
  fi
done
