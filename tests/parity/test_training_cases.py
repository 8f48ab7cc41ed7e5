"""Gradients at the reference's weights, and a short run of plain SGD."""

import torch
from tests.parity.reference import ATOL, LOSS_SUM_ATOL, Case, close, trained
from torch import Tensor
from torch.nn import functional as F

from longmem.modeling.longmem import LongMem


def test_losses_and_gradients_match_the_released_code(grad_case: Case) -> None:
    case, model, tensors = grad_case, grad_case.reference.model().train(), grad_case.tensors
    bank = case.bank(model)
    for index, record in enumerate(case.added):
        prefix = record["prefix"]
        model.zero_grad(set_to_none=True)
        input_ids = case.segment(tensors, index)
        out = model(input_ids, memory=bank)
        loss = summed_loss(case, out.logits, tensors[f"{prefix}target"])
        (loss / record["ntokens_denominator"]).backward()
        close(loss.detach(), tensors[f"{prefix}loss_sum"].squeeze(), f"{prefix}loss_sum", LOSS_SUM_ATOL)
        check_gradients(model, tensors, prefix, record["params_without_grad"])
        bank.add(out.kv)
        assert bank.fill == record["dstore_idx_after"]


def test_only_the_parameters_that_the_released_code_trains_are_trained(grad_case: Case) -> None:
    model = grad_case.reference.model()
    theirs = {id(trained(model, name)) for name in grad_case.record["trainable"]}
    ours = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert ours == theirs


def test_the_run_ends_at_the_weights_of_the_released_code(sgd_case: Case) -> None:
    """Seven steps of plain SGD while the memory fills and evicts."""
    case, model, tensors = sgd_case, sgd_case.reference.model().train(), sgd_case.tensors
    bank, length = case.bank(model), case.record["seg_len"]
    frozen = {name: value.clone() for name, value in model.backbone.model.state_dict().items()}
    for index, step in enumerate(case.added):
        targets = tensors["tokens"][:, index * length + 1 : (index + 1) * length + 1]
        model.zero_grad(set_to_none=True)
        out = model(case.segment(tensors, index), memory=bank)
        loss = summed_loss(case, out.logits, targets)
        (loss / step["ntokens_denominator"]).backward()
        assert abs(loss.item() - step["loss_sum"]) <= LOSS_SUM_ATOL, step["prefix"]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= case.record["lr"] * parameter.grad
        bank.add(out.kv)
        assert bank.fill == step["dstore_idx_after"]
    for name, value in tensors.items():
        if name.startswith("final_param."):
            close(trained(model, name.removeprefix("final_param.")).detach(), value, name)
    with torch.no_grad():
        after = model.eval()(case.segment(tensors, 0), memory=bank).logits
    close(after, tensors["after.logits_seg0"], "after.logits_seg0")
    for name, value in model.backbone.model.state_dict().items():
        assert torch.equal(value, frozen[name]), name


def summed_loss(case: Case, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=case.reference.config["pad"], reduction="sum"
    )


def check_gradients(model: LongMem, tensors: dict[str, Tensor], prefix: str, without: list[str]) -> None:
    """A gate that met no memory has no gradient, or zeros: which of the two is an accident of the graph."""
    for name, gradient in tensors.items():
        if name.startswith(f"{prefix}grad."):
            ours = trained(model, name.removeprefix(f"{prefix}grad.")).grad
            assert ours is not None, name
            close(ours, gradient, name, ATOL)
    for name in without:
        ours = trained(model, name).grad
        assert ours is None or not ours.any(), name
