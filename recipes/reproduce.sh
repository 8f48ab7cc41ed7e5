#!/usr/bin/env bash
# The shipped pair from its texts: tokenizer, backbone, SideNet, control and MemTRM, and what results/ says of them.
# About six hours on two cores without AVX-512. Stopped, it goes on where it was; what is finished is not made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shared=${SHARED:-../shared/data}
books=$shared/books latex=$shared/latex python=data/python

train() { # NAME RECIPE [SETTINGS...]
    local name=$1 recipe=$2
    shift 2
    [ -e "runs/$name/final/config.json" ] || longmem train "recipes/$recipe.toml" --resume --set "run.out_dir=runs/$name" "$@"
}

measure() { # NAME TEXT
    longmem eval perplexity --model runs/small-sidenet --control runs/small-control --memtrm runs/small-memtrm \
        --data "$2" --memory-sizes 1k,4k,8k,16k --max-tokens 20480 --group-by-prefix __ --out "runs/results/small-$1"
}

[ -e "$python/train.jsonl" ] || longmem data python --out "$python"
[ -e data/tokenizer/tokenizer.json ] || longmem data tokenizer --vocab-size 6144 --out data/tokenizer \
    --data "$books/train-02.tar.xz" --data "$latex/train.tar.xz" --data "$python/train.jsonl"

train small-backbone small-backbone
backbone=(--set backbone.path=runs/small-backbone/final)
train small-sidenet small-sidenet "${backbone[@]}"
train small-control small-sidenet "${backbone[@]}" --set sidenet.memory=false
train small-memtrm small-sidenet "${backbone[@]}" --set method=memtrm --set optim.muon_lr=0.002 --set optim.lr=3e-4 --set sidenet.gate=0.1

measure books "$books/test.tar.xz"
measure latex "$latex/test.tar.xz"
measure python "$python/test.jsonl"
longmem report runs/results --out runs/results
