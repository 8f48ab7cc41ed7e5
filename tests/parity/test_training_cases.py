"""Gradients at the reference's weights, and a short run of plain SGD."""

from tests.parity.reference import ATOL, LOSS_SUM_ATOL, Case, close, trained
from torch import Tensor
from torch.nn import functional as F

from longmem.modeling.longmem import LongMem

KIND = "grad"


def test_losses_and_gradients_match_the_released_code(case: Case) -> None:
    model, tensors = case.reference.model().train(), case.tensors
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
        assert int(bank.chunks[0]) == record["dstore_idx_after"]


def test_only_the_parameters_that_the_released_code_trains_are_trained(case: Case) -> None:
    model = case.reference.model()
    theirs = {id(trained(model, name)) for name in case.record["trainable"]}
    ours = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert ours == theirs


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
