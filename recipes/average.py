"""The mean of SideNets that began alike: one that is good at what each of them is.

Usage: python recipes/average.py RUN_OR_CHECKPOINT RUN_OR_CHECKPOINT... --out FOLDER [--shares 1 3] [--gates-of-last]

All must stand on the same backbone and read memory alike; other settings and the tokenizer are those of the last. So
are the gates with ``--gates-of-last``, where the others never learned to read memory.
(Wortsman et al., "Model soups", 2022.)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longmem import LongMem
from longmem.data.tokens import load_tokenizer
from longmem.errors import CheckpointError
from longmem.modeling.checkpoints import checkpoint_folder

READING = ("memory_layer", "stride", "fusion", "final_state")
"""Settings that say what the weights mean."""


def average(folders: list[str], out: Path, shares: list[float] | None = None, gates_of_last: bool = False) -> LongMem:
    """Write the mean of the SideNets' weights to ``out``, and return it; ``shares`` says how much of each is in it.

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
    shares = shares or [1.0] * len(folders)
    for name, last in weights[-1].items():
        if not (gates_of_last and name.startswith(("gates.", "memory_gate"))):
            pairs = zip(weights, shares, strict=True)
            last.copy_(sum(share / sum(shares) * found[name].float() for found, share in pairs))
    mean.save_pretrained(out)
    load_tokenizer(checkpoint_folder(folders[-1])).save_pretrained(str(out))
    return mean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", help="how much of each; default: as much of each")
    parser.add_argument("--gates-of-last", action="store_true")
    given = parser.parse_args()
    if given.shares and len(given.shares) != len(given.checkpoints):
        parser.error(f"--shares ({len(given.shares)}) must name one for each of {len(given.checkpoints)} checkpoints")
    average(given.checkpoints, given.out, given.shares, given.gates_of_last)
    sys.stdout.write(f"{given.out}\n")
