"""The mean of SideNets that were trained on from one another: one that is good at what each of them is.

Usage: python recipes/average.py RUN_OR_CHECKPOINT RUN_OR_CHECKPOINT... --out FOLDER

All must stand on the same backbone and read memory alike; other settings and the tokenizer are those of the last.
(Wortsman et al., "Model soups", 2022.)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from longmem import LongMem
from longmem.data import load_tokenizer
from longmem.errors import CheckpointError
from longmem.modeling.checkpoints import checkpoint_folder

READING = ("memory_layer", "stride", "fusion", "final_state")
"""Settings that say what the weights mean."""


def average(folders: list[str], out: Path) -> LongMem:
    """Write the mean of the SideNets' weights to ``out``, and return it.

    Raises:
        CheckpointError: they have other backbones, other layers or another way to read memory.
    """
    models = [LongMem.from_pretrained(checkpoint_folder(folder)) for folder in folders]
    mean = models[-1]
    weights = [model.sidenet.state_dict() for model in models]
    for folder, model, found in zip(folders, models, weights, strict=True):
        if model.fingerprint != mean.fingerprint:
            raise CheckpointError(
                f"{folder}: has another backbone than {folders[-1]}; average SideNets of one backbone"
            )
        for setting in READING:
            theirs, ours = getattr(model.config, setting), getattr(mean.config, setting)
            if theirs != ours:
                raise CheckpointError(
                    f"{folder}: {setting} is {theirs!r}, that of {folders[-1]} {ours!r}; average like ones"
                )
        if {name: one.shape for name, one in found.items()} != {name: one.shape for name, one in weights[-1].items()}:
            raise CheckpointError(f"{folder}: has other layers than {folders[-1]}; average SideNets of one shape")
    mean.sidenet.load_state_dict({name: torch.stack([w[name] for w in weights]).mean(0) for name in weights[-1]})
    mean.save_pretrained(out)
    load_tokenizer(checkpoint_folder(folders[-1])).save_pretrained(str(out))
    return mean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    average(given.checkpoints, given.out)
    sys.stdout.write(f"{given.out}\n")
