"""Memory for a model of your own: a tiny random Llama here, any causal language model in its place.

    python examples/your_model.py [BACKBONE]

Which layer, how much memory, what adaptation costs, a few steps of it, saving, loading and generating.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longmem import LongMem, MemoryBank
from longmem.modeling.families import Family
from longmem.training.estimate import estimate
from longmem.training.recipe import Recipe

torch.manual_seed(0)
if len(sys.argv) > 1:
    backbone = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
    backbone = LlamaForCausalLM(LlamaConfig(vocab_size=500, num_key_value_heads=2, **shape))

# 1. which layer: one with keys of its own over all of its text; None is the paper's three quarters of the depth, "auto"
# measures which layer's keys find what followed an earlier occurrence (a random model has none that does)
print("layers whose keys can be remembered:", Family.of(backbone).memory_layers())
model = LongMem.from_backbone(backbone, memory_layer=None, memory_size=4096, num_retrieved=32)
print(f"layer {model.memory_layer} is remembered, read by SideNet layer {model.augmented_layer}")

# 2. how much memory: keys and values of one layer, and a float32 mean key for each chunk
bank, numbers = MemoryBank.for_model(model), model.memory_heads * model.memory_head_dim
kept = 4096 * numbers * 2 * model.dtype.itemsize + 4096 // 4 * numbers * 4
print(f"4,096 tokens take {kept:,} bytes by arithmetic, {bank.nbytes:,} in the bank with its small parts")

# 3. what adaptation costs
text = {"paths": ["your/texts"], "window": 1024}
budget = {"rows": 8, "tokens": 100_000_000, "precision": "bf16"}
settings = {"task": "adapt", "data": text, "backbone": {"path": "yours"}, "sidenet": {"memory_size": 4096}}
recipe = Recipe.parse({**settings, "optim": budget})
print("\n".join(estimate(recipe, "a100-80gb", backbone.config).lines()))

# 4. adaptation: read, then write, segment by segment; `longmem train` does this with all that belongs to it
optimiser = torch.optim.AdamW(model.train().trainable_parameters(), lr=1e-3)
text = torch.randint(0, 500, (1, 96)).repeat(1, 4)  # what comes back is what memory is for
for step, segment in enumerate(text.split(96, dim=1)):
    out = model(segment, labels=segment, memory=bank, use_cache=False)
    out.loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    bank.add(out.kv)  # after backward
    print(f"segment {step}: loss {out.loss.item():.3f}, {int(bank.tokens[0])} tokens remembered")

# 5. the SideNet is saved alone and loaded beside its backbone
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = LongMem.from_pretrained(folder, backbone=backbone)
ids = loaded.generate(text[:, :20], memory=bank, max_new_tokens=8, do_sample=False, pad_token_id=0)
print("generated:", ids[0, 20:].tolist())
