#!/usr/bin/env bash
# What pre-training is worth on real scans: the tables of the README's Results, from nothing.
#
#   bash assets/study.sh                               # left atria, 8 labels, three seeds
#   LABELS="0.1 0.2 1" DECODERS="light unetr" SEEDS="0 1 2 3 4" bash assets/study.sh
#   RUNS=out/la-long STEPS=5000 TUNE=1200 DECODERS=unetr ARMS="scratch pre-16" MORE=no \
#     HOW="--spacing 1.25 1.25 0.86 --augment strong" bash assets/study.sh
#   NODULES=data/lidc/cases_7to14mm.csv CROPS=data/lidc/cases.csv bash assets/study.sh  # these too
#
# 80 atria without their labels to pre-train on (4 of them to validate), a few labels to fine-tune
# with, 20 to test on: the usual split (train.list, test.list); they need h5py. Then the demo's
# made-up patients, a tenth of them with labels. Every part is left out where its result is there
# already, so the script can be stopped and started again. It says how long each part took.
set -euo pipefail
cd "$(dirname "$0")/.."

SEEDS=${SEEDS:-0 1 2}        # of fine-tuning; each has labels of its own
LABELS=${LABELS:-0.1}        # shares of the 80: 0.1 is 8 labels; or files with lists of names
DECODERS=${DECODERS:-light}  # light: what the encoder knows; unetr: published
STEPS=${STEPS:-1500}         # of pre-training
OPTIMISER=${OPTIMISER:-muon} # of pre-training; README says which rows are of adamw
TUNE=${TUNE:-400}            # of fine-tuning
SHORT=${SHORT:-500}          # of pre-training, in the ablations
ARMS=${ARMS:-scratch frozen pre-16 pre-4}
MORE=${MORE:-yes}            # the ablations and the made-up patients, too
GRID="--spacing 1.25 1.25 1.25"
HOW=${HOW:-$GRID --augment standard}  # how to fine-tune
RUNS=${RUNS:-out/la}         # a folder for each setting
NODULES=${NODULES:-}         # a list file,label,split,patient, as finetune_cls.py takes it
CROPS=${CROPS:-$NODULES}     # such a list, to pre-train on its split train without the labels

part() {  # part RESULT COMMAND…: run it where there is no RESULT yet, and say how long it took
  local result=$1 start=$SECONDS
  shift
  [ -e "$result" ] && return
  "$@"
  echo "== $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s: $result"
}

pretrain() { python pretrain.py --size nano --optimiser "$OPTIMISER" "$@"; }

# the scans, and a corpus of the 80 that train.list names
part data/la git clone --depth 1 https://github.com/yulequan/UA-MT data/la
part data/corpus-la/index.jsonl python serialize.py --spatial data/la/data $GRID \
  --out data/corpus-la

# slabs side by side (--stride 16 of 64 voxels), and overlapping as published (4)
for stride in 16 4; do
  [[ $ARMS == *pre-$stride* ]] || continue
  part $RUNS/pre-$stride/metrics.json pretrain --data data/corpus-la \
    --stride $stride --steps "$STEPS" --val-every 250 --out $RUNS/pre-$stride
  part $RUNS/probe-$stride/metrics.json python eval.py probe --ckpt $RUNS/pre-$stride/ckpt.pt \
    --layer all --tasks la $GRID --out $RUNS/probe-$stride
done

tune() {  # tune RUN SEED LABELS DECODER STEPS FLAG…: fine-tune, then score on the scans' own grid
  local run=$1 seed=$2 labels=$3 decoder=$4 steps=$5
  shift 5
  part "$run/metrics.json" python finetune_seg.py --task la --preset nano $HOW \
    --labels "$labels" --decoder "$decoder" --steps "$steps" --val-every "$steps" \
    --seed "$seed" --out "$run" "$@"
  part "$run/eval-seg/metrics.json" python eval.py seg --ckpt "$run/ckpt.pt"
}

# from scratch, a random encoder that stays as it is, and both pre-trained ones
for seed in $SEEDS; do
  for labels in $LABELS; do
    for decoder in $DECODERS; do
      for arm in $ARMS; do
        case $arm in
          scratch) init="--init scratch:nano --layer-decay 1" ;;
          frozen) init="--init scratch:nano --freeze" ;;
          *) init="--init $RUNS/$arm/ckpt.pt" ;;
        esac
        run=$RUNS/$decoder-$(basename "$labels")/$arm-$seed
        tune "$run" "$seed" "$labels" "$decoder" "$TUNE" $init
      done
    done
  done
done

if [ $MORE = yes ]; then
  # the ablations: short pre-training, one thing changed, then a decoder on the frozen encoder (the
  # random one's with the weight decay of training from scratch)
  part $RUNS/codes/metrics.json python tokenize_vq.py --size nano --data data/corpus-la \
    --stride 16 --out $RUNS/codes
  for arm in plain causal image overlap codes adamw random; do
    how="--stride 16"
    case $arm in
      causal) how+=" --attention causal" ;;
      image) how+=" --order image" ;;
      overlap) how="--stride 4" ;;
      adamw) how+=" --optimiser adamw" ;;
      codes) how+=" --target vq --tokenizer $RUNS/codes/ckpt.pt" ;;
    esac
    encoder=$RUNS/short-$arm/ckpt.pt
    if [ $arm = random ]; then
      encoder=scratch:nano
    else
      part $RUNS/short-$arm/metrics.json pretrain --data data/corpus-la \
        $how --steps "$SHORT" --val-every 250 --out $RUNS/short-$arm
    fi
    for seed in $SEEDS; do
      tune $RUNS/ablations-0.1/$arm-$seed "$seed" 0.1 light 200 --freeze --init $encoder
    done
  done

  # made-up patients: 15 organs (undecayed: the pre-trained encoder at the decoder's rate, in a
  # table of its own), and nodules of two classes
  part data/phantom/corpus/index.jsonl python serialize.py --phantom
  part out/phantom/pre/metrics.json pretrain --data data/phantom/corpus --out out/phantom/pre
  for seed in $SEEDS; do
    for arm in scratch pretrained undecayed; do
      init=out/phantom/pre/ckpt.pt
      [ $arm = scratch ] && init="scratch:nano --layer-decay 1"
      run=out/phantom/organs-0.1/$arm-$seed
      if [ $arm = undecayed ]; then
        init+=" --layer-decay 1"
        run=out/phantom/undecayed-0.1/$arm-$seed
      fi
      part $run/metrics.json python finetune_seg.py --task phantom --preset nano --labels 0.1 \
        --seed "$seed" --init $init --out $run
      part $run/eval-seg/metrics.json python eval.py seg --ckpt $run/ckpt.pt
      if [ $arm = undecayed ]; then
        part out/phantom/undecayed-0.1/scratch-$seed cp -r out/phantom/organs-0.1/scratch-$seed \
          out/phantom/undecayed-0.1/
        continue
      fi
      run=out/phantom/nodules-0.1/$arm-$seed
      part $run/metrics.json python finetune_cls.py --labels 0.1 --seed "$seed" --init $init \
        --out $run
    done
  done

  # the kinds of sequences, on the same patients: spatial alone, with contrast, with semantic too
  for mix in spatial=1 spatial=1,contrast=1 equal; do
    part out/phantom/pre-$mix/metrics.json pretrain --data data/phantom/corpus \
      --mix $mix --steps "$SHORT" --val-every 250 --out out/phantom/pre-$mix
    for seed in $SEEDS; do
      run=out/phantom/mix-0.1/$mix-$seed
      part $run/metrics.json python finetune_cls.py --labels 0.1 --seed "$seed" \
        --init out/phantom/pre-$mix/ckpt.pt --out $run
    done
  done
fi

by_patient() {  # by_patient LIST FOLDER: links to the crops of its split train, a folder a patient
  python - "$1" "$2.part" << 'END'
import csv, sys
from pathlib import Path

listed, folder = map(Path, sys.argv[1:])
for row in csv.DictReader(listed.open()):
    if row["split"] == "train":
        crop = (listed.parent / row["file"]).resolve()
        link = folder / row["patient"] / crop.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(crop)
END
  mv "$2.part" "$2"
}

if [ -n "$NODULES" ]; then
  # real nodules: pre-training on the crops, then a tenth of the labels, and all of them
  rm -rf data/nodules.part  # of a run that was stopped
  part data/nodules by_patient "$CROPS" data/nodules
  part data/corpus-nodules/index.jsonl python serialize.py --spatial data/nodules \
    --patient "data/nodules/([^/]+)/" --spacing 0.5 0.5 0.5 --out data/corpus-nodules
  part out/nodules/pre/metrics.json pretrain --data data/corpus-nodules \
    --stride 16 --steps "$SHORT" --val-every 250 --out out/nodules/pre
  for labels in 0.1 1; do
    for seed in $SEEDS; do
      for arm in scratch pretrained; do
        init=$([ $arm = scratch ] && echo scratch:nano || echo out/nodules/pre/ckpt.pt)
        run=out/nodules/labels-$labels/$arm-$seed
        part $run/metrics.json python finetune_cls.py --task mine --data "$NODULES" \
          --labels $labels --seed "$seed" --init $init --out $run
      done
    done
  done
fi

for folder in $RUNS/*-*/ out/phantom/*/ out/nodules/*/; do
  if compgen -G "$folder*/metrics.json" > /dev/null && [ ! -e "$folder/metrics.json" ]; then
    python eval.py table "$folder" --out "$folder/table"
  fi
done
