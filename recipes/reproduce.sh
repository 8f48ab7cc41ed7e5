#!/usr/bin/env bash
# The shipped pair from its texts: tokenizer, backbone, SideNet, control, MemTRM and needle, and what results/ says of them.
# About ten hours on two cores without AVX-512. Stopped, it goes on where it was; what is finished is not made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shared=${SHARED:-../shared/data}
books=$shared/books latex=$shared/latex python=data/python

train() { # NAME RECIPE [SETTINGS...]
    local name=$1 recipe=$2
    shift 2
    [ -e "runs/$name/final/config.json" ] || longmem train "recipes/$recipe.toml" --resume --set "run.out_dir=runs/$name" "$@"
}

model=(--model runs/small-sidenet)
models=("${model[@]}" --control runs/small-control --memtrm runs/small-memtrm)

measure() { # NAME TEXT [SETTINGS...]
    longmem eval perplexity "${models[@]}" --training-free 0.4 --data "$2" --memory-sizes 1k,8k --max-tokens 10240 \
        --group-by-prefix __ --out "runs/results/small-$1" "${@:3}"
}

measure_long() { # NAME TEXT
    longmem eval perplexity "${model[@]}" --data "$2" --memory-sizes 8k,32k --max-tokens 36864 --num-documents 4 \
        --protocol segments --group-by-prefix __ --out "runs/results/small-$1-long"
}

[ -e "$python/train.jsonl" ] || python recipes/data/python.py --out "$python"
[ -e data/tokenizer/tokenizer.json ] || python recipes/data/tokenizer.py --vocab-size 6144 \
    --out data/tokenizer "$books/train-02.tar.xz" "$latex/train.tar.xz" "$python/train.jsonl"

train small-backbone small-backbone
backbone=(--set backbone.path=runs/small-backbone/final)
train small-sidenet small-sidenet "${backbone[@]}"
train small-control small-sidenet "${backbone[@]}" --set sidenet.memory=false
train small-memtrm small-sidenet "${backbone[@]}" --set method=memtrm --set optim.muon_lr=0.002 --set optim.lr=3e-4 --set sidenet.gate=0.1

train needle-sidenet needle-sidenet "${backbone[@]}" --set sidenet.start=runs/small-sidenet/final
train needle-large needle-sidenet "${backbone[@]}" --set sidenet.start=runs/needle-sidenet/final --set run.seed=2 \
    --set needles.least_tokens=16384 --set needles.most_tokens=1048576 --set needles.grows=0 \
    --set optim.steps=400 --set optim.muon_lr=0.015 --set optim.lr=1e-3
train needle-far needle-far "${backbone[@]}" --set sidenet.start=runs/needle-large/final
train needle-farther needle-far "${backbone[@]}" --set sidenet.start=runs/needle-far/final --set run.seed=5 \
    --set needles.least_tokens=262144 --set optim.steps=600
backbone+=(--set "data.paths=[\"$books/train-01.tar.xz\", \"$latex/train.tar.xz\", \"$python/train.jsonl\"]")
train needle-all needle-far "${backbone[@]}" --set sidenet.start=runs/needle-farther/final --set run.seed=6 \
    --set needles.least_tokens=32768 --set optim.steps=350
train needle-last needle-far "${backbone[@]}" --set sidenet.start=runs/needle-all/final --set run.seed=7 \
    --set needles.least_tokens=131072 --set optim.steps=300
python recipes/average.py runs/needle-farther runs/needle-all runs/needle-last --out runs/needle

measure books "$books/test.tar.xz"
measure latex "$latex/test.tar.xz"
measure python "$python/test.jsonl" --group-by-prefix - --include 'stdlib*' --include 'packages__[cjr]*' --include 'packages__networkx-0[0-2]'
measure_long books "$books/test.tar.xz"
measure_long latex "$latex/test.tar.xz"
[ -e data/chapterbreak/chapterbreak_ctx_8192.json ] || python recipes/data/chapterbreak.py "$books/test.tar.xz" --out data/chapterbreak
longmem eval chapterbreak "${models[@]}" --training-free 0.4 --data data/chapterbreak/chapterbreak_ctx_8192.json --out runs/results/chapterbreak
longmem eval icl "${models[@]}" --training-free 0.1 --memory-sizes 64k --data "$shared/icl" --out runs/results/icl
needle=(--model runs/needle --systems backbone,memory_1)
longmem eval needle "${needle[@]}" --data "$python/test.jsonl" --lengths 4k,16k,64k,1m --out runs/results/needle
longmem eval needle "${needle[@]}" --data "$books/test.tar.xz" --lengths 64k,1m --out runs/results/needle-books
[ -e data/conversations.json ] || python recipes/data/conversations.py --out data/conversations.json --seed 0
longmem eval dialogue "${models[@]}" --training-free 0.1 --data data/conversations.json --out runs/results/dialogue
python -m benchmarks.ablation "${model[@]}" --data "$python/valid.jsonl" --max-tokens 4096 --num-documents 8 --out runs/results/ablate-python
python -m benchmarks.ablation "${model[@]}" --data "$latex/test.tar.xz" --max-tokens 36864 --num-documents 4 --protocols segments \
    --memory-size 32768 --of num_retrieved=32,64,128,256 --of memory_size=4096,8192,16384,32768 --out runs/results/ablate-latex-long
python -m benchmarks.efficiency --random hidden=512,layers=12,heads=8,vocab=8192 --contexts 1024,4096,16384 --new-tokens 16 --budget 240 \
    --out runs/results/efficiency
for text in "$latex/valid.tar.xz" "$python/valid.jsonl"; do
    longmem layers runs/small-backbone/final --data "$text" --distances 128,256 --rows 4 \
        --out "runs/results/layers-$(basename "$(dirname "$text")")"
done
longmem report runs/results --out runs/results
