"""Seven steps of plain SGD while the memory fills and evicts."""

import torch
from tests.parity.reference import LOSS_SUM_ATOL, Case, close, trained
from torch.nn import functional as F

KIND = "sgd"


def test_the_run_ends_at_the_weights_of_the_released_code(case: Case) -> None:
    model, tensors, record = case.reference.model().train(), case.tensors, case.record
    bank, length = case.bank(model), case.record["seg_len"]
    frozen = {name: value.clone() for name, value in model.backbone.model.state_dict().items()}
    for index, step in enumerate(case.added):
        targets = tensors["tokens"][:, index * length + 1 : (index + 1) * length + 1]
        model.zero_grad(set_to_none=True)
        out = model(case.segment(tensors, index), memory=bank)
        loss = F.cross_entropy(
            out.logits.flatten(0, 1), targets.flatten(), ignore_index=case.reference.config["pad"], reduction="sum"
        )
        (loss / step["ntokens_denominator"]).backward()
        assert abs(loss.item() - step["loss_sum"]) <= LOSS_SUM_ATOL, step["prefix"]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= record["lr"] * parameter.grad
        bank.add(out.kv)
        assert int(bank.chunks[0]) == step["dstore_idx_after"]
    for name, value in tensors.items():
        if name.startswith("final_param."):
            close(trained(model, name.removeprefix("final_param.")).detach(), value, name)
    with torch.no_grad():
        after = model.eval()(case.segment(tensors, 0), memory=bank).logits
    close(after, tensors["after.logits_seg0"], "after.logits_seg0")
    for name, value in model.backbone.model.state_dict().items():
        assert torch.equal(value, frozen[name]), name
