"""A backbone that is too large for one device, or for its precision: quantised, or spread over devices.

    python examples/large_backbone.py BACKBONE --bits 4bit
    python examples/large_backbone.py BACKBONE --device-map auto

The SideNet's layers are ordinary float32 layers, copied from what the backbone's weights stand for, each on the device
of the layer it was copied from.
"""

import argparse

import torch
from transformers import AutoTokenizer

from longmem import LongMem, MemoryBank
from longmem.modeling.weights import quantization

options = argparse.ArgumentParser()
options.add_argument("backbone")
options.add_argument("--bits", choices=("4bit", "8bit"))
options.add_argument("--device-map")
asked = options.parse_args()

loading = {}
if asked.bits:
    loading["quantization_config"] = quantization(asked.bits, torch.bfloat16)
if asked.device_map:
    loading["device_map"] = asked.device_map
model = LongMem.from_backbone(asked.backbone, side_dtype=torch.float32, **loading).train()
tokenizer = AutoTokenizer.from_pretrained(asked.backbone)
optimiser = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3)
bank = MemoryBank.for_model(model, rows=1)

text = "The key lies under the third stone behind the old mill. " * 8
ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
for step, segment in enumerate(ids.split(64, dim=1)):
    out = model(segment, labels=segment, memory=bank, use_cache=False)
    out.loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    bank.add(out.kv)  # after backward
    print(f"segment {step}: loss {out.loss.item():.3f}, {int(bank.tokens[0])} tokens remembered")
places = sorted({str(parameter.device) for parameter in model.trainable_parameters()})
print(f"{sum(p.numel() for p in model.trainable_parameters()):,} trained parameters on {', '.join(places)}")
