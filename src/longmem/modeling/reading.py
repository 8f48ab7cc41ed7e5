"""Memory inside an attention layer: search before it runs, fuse before its output projection.

``MemoryReader`` has these steps in one layer: ``search`` looks up chunks and attends to them, the layer's own local
attention runs, ``fuse`` mixes both, by the formula below it. ``Reading`` is what one call of the model knows and finds.

B rows · H heads · T tokens · D head_dim · R chunks per token and head
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longmem.config import Fusion
from longmem.errors import BackboneError, MemoryBankError
from longmem.modeling.attention import MemoryAttentionOutput, local_lse, memory_attention
from longmem.modeling.backbone import current_run
from longmem.modeling.families import ADAPTERS, QKV, Family, scaling_of
from longmem.types import Memory, RetrievedMemory, check_memory


@dataclass
class LayerRead:
    """What one layer read from memory in one call.

    Attributes:
        layer: the memory layer whose keys were searched.
        queries: (B, H, T, D), position-free, what was searched with; a loss on the search itself starts from them.
        retrieved: the chunks that were found.
        memory: attention over them.
        share: (B, H, T), the share of each head's output that memory got; None until the layer has fused.
    """

    layer: int
    queries: Tensor
    retrieved: RetrievedMemory
    memory: MemoryAttentionOutput
    share: Tensor | None = None

    @property
    def shares(self) -> Tensor | None:
        """(B, H, T, R), the share of each head's output that each chunk got; None unless the call explains."""
        return None if self.memory.parts is None or self.share is None else self.memory.parts * self.share[..., None]


@dataclass
class Reading:
    """How one call reads memory, and what it read: the state of the call, held by nothing that outlives it.

    Attributes:
        memory: what is searched.
        rows: (B,) the memory's row of every batch row; None is row b for batch row b.
        num_chunks: R.
        recency, temperature: see ``memory_attention``.
        explain: whether each layer also keeps how its attention was divided among chunks.
        reads: what each layer read, by the place of its memory layer among the memory layers.
    """

    memory: Memory
    rows: Tensor | None
    num_chunks: int
    recency: float = 0.0
    temperature: float = 1.0
    explain: bool = False
    reads: dict[int, LayerRead] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, memory: Memory | None, rows: Tensor | None, explain: bool) -> Reading | None:
        """How a call of ``model`` reads ``memory``; None where there is none."""
        check_memory(memory)
        if memory is None:
            return None
        theirs = getattr(memory, "fingerprint", None)
        if theirs is not None and not model.accepts(theirs):
            raise MemoryBankError(
                f"this memory was written by backbone {theirs}, this model's backbone is {model.fingerprint}; "
                "keys of one model mean nothing to another: write the text again with this model"
            )
        layers = getattr(memory, "memory_layers", None)
        if layers is not None and tuple(layers) != model.memory_layers:
            raise MemoryBankError(
                f"this memory holds keys of {_named(layers)}, this model remembers {_named(model.memory_layers)}; "
                "keys of one layer mean nothing to another: write the text again with this model"
            )
        retrieved = model.config.num_retrieved
        if memory.chunk_size > retrieved:
            raise MemoryBankError(
                f"the memory's chunk_size ({memory.chunk_size}) must not exceed num_retrieved "
                f"({retrieved}); make the bank with chunk_size {model.config.chunk_size}"
            )
        config = model.config
        return cls(memory, rows, retrieved // memory.chunk_size, config.recency, config.memory_temperature, explain)


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


@dataclass(eq=False)
class MemoryReader:
    """Lets one attention module read memory, for every family alike.

    Outside of a run with a ``Reading`` the module is what it was. Making one is enough: its hooks on the module keep it
    alive.

    Args:
        attention: a SideNet's own, or that of the backbone's mirror.
        family: of the backbone.
        layer: the memory layer that is searched.
        place: its place among the memory layers.
        fusion: how local and memory attention are mixed.
        owner: has what decides the shares: ``gates``, a ``TokenGate`` for each place, or else logits in
            ``memory_gate`` (n*H,).
        probe: gives the position-free projections of a call of ``attention``, from what a forward pre-hook is given.
    """

    attention: InitVar[nn.Module]
    family: InitVar[Family]
    layer: int
    place: int
    fusion: Fusion
    owner: Any
    probe: Callable[..., QKV]

    def __post_init__(self, attention: nn.Module, family: Family) -> None:
        self.num_heads = int(family.config.num_attention_heads)
        attention.register_forward_pre_hook(self.search, with_kwargs=True)
        name = type(attention).__name__
        if name not in ADAPTERS:  # it calls transformers' attention interface: there are its local heads and scores
            _fuse_in_interface(attention, self)
        elif self.fusion != "gate":
            raise BackboneError(
                f'fusion "{self.fusion}" needs the local scores, which {name} does not give; use fusion "gate"'
            )
        else:
            family.output_projection(attention).register_forward_pre_hook(self._before_projection)

    def search(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the attention runs: its position-free queries search memory and attend to what they find."""
        if (reading := _current_reading()) is None:
            return
        qkv = self.probe(module, args, kwargs)
        # the first layer is the default of ``search``, so a memory of one layer need not have the argument
        which = {"layer": self.place} if self.place else {}
        retrieved = reading.memory.search(qkv.queries.detach(), reading.num_chunks, reading.rows, **which)
        memory = memory_attention(
            qkv.queries,
            retrieved,
            scaling=qkv.scaling,
            softcap=qkv.softcap,
            recency=reading.recency,
            temperature=reading.temperature,
            explain=reading.explain,
        )
        reading.reads[self.place] = LayerRead(self.layer, qkv.queries, retrieved, memory)

    def fuse(self, reading: Reading, local_out: Tensor, lse: Callable[[], Tensor] | None) -> Tensor:
        """When the local heads (B, H, T, D) are there: mix in what was found.

        Args:
            lse: computes the log-sum-exp (B, H, T) of the local scores; None where the family does not give them.
        """
        read = reading.reads[self.place]
        memory, gate = read.memory, self.owner.memory_gate.view(-1, self.num_heads)[self.place]
        if self.fusion == "gate":
            logits = gate.float().view(1, -1, 1)
        elif self.fusion == "softmax":
            logits = competing(cast(Any, lse)(), memory.lse, memory.found, gate)
        else:
            token_gate = self.owner.gates[self.place]
            logits = token_gate(read.queries, local_out, cast(Any, lse)(), memory.out, memory.lse, memory.found)
        out, share = fuse(local_out, memory.out, memory.found, logits)
        read.share = share.detach()
        return out

    def _before_projection(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """Fuse in families that do not use the attention interface: the projection is given the local heads."""
        if (reading := _current_reading()) is None:
            return None
        local_out = args[0].unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return (self.fuse(reading, local_out, None).transpose(1, 2).flatten(2), *args[1:])


def fuse(local_out: Tensor, memory_out: Tensor, found: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mix local attention with attention over memory: out = (1 - share) * local + share * memory.

    Args:
        local_out: causal attention over the segment, (B, H, T, D).
        memory_out: attention over the retrieved tokens, (B, H, T, D).
        found: (B, H, T) bool, False where a token retrieved nothing.
        logits: broadcast to (B, H, T); their sigmoid is the share given to memory. By the setting ``fusion`` they are
            the gate of each head ("gate": the paper, with the sign of the released code), ``competing`` ("softmax"),
            or a ``TokenGate``'s ("token").

    Returns:
        the mixed heads, bit for bit ``local_out`` wherever nothing was found, and the shares (B, H, T), 0 there.
    """
    share = torch.where(found, torch.sigmoid(logits), 0.0)
    weight = share.unsqueeze(-1).to(local_out.dtype)
    mixed = (1 - weight) * local_out + weight * memory_out.to(local_out.dtype)
    # where() rather than a zero weight: an empty bank must give local_out bit for bit
    return torch.where(found.unsqueeze(-1), mixed, local_out), share


def competing(local_lse: Tensor, memory_lse: Tensor, found: Tensor, memory_gate: Tensor) -> Tensor:
    """The logits (B, H, T) with which ``fuse`` is one softmax over local and retrieved tokens together.

    Let a and b be the log-sum-exps of the local and the memory scores. One softmax over both is the local output and
    the memory output mixed with share sigmoid(b - a). So the share of a token depends on how well its query matches.
    FoT/LongLLaMA also attend to local and memory keys at once.

    Args:
        local_lse: (B, H, T), log of the local softmax's denominator.
        memory_lse: (B, H, T), the same over memory; -inf where nothing was ``found``.
        memory_gate: (H,), added to the memory scores.
    """
    return torch.where(found, memory_lse.float(), 0.0) - local_lse.float() + memory_gate.float().view(1, -1, 1)


class TokenGate(nn.Module):
    """Every token decides for itself how much of each head it gives to memory.

    share = sigmoid(bias + memory_lse_weight * m - local_lse_weight * l
                    + query_vector . q + local_vector . u + memory_vector . v)

    with l and m the log-sum-exps of local and memory scores, q the query without its position, u and v the two outputs.
    Both weights 1 and all else 0 is one softmax over local and retrieved tokens (``competing``). A layer has
    3H + 3HD numbers.

    Args:
        heads: H.
        head_dim: D.
        bias: where the heads' biases start, (H,) or one for all. 0 is one softmax; at -8 memory is hardly read.
    """

    def __init__(self, heads: int, head_dim: int, *, bias: Tensor | float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.as_tensor(bias, dtype=torch.float32).expand(heads).clone())
        self.local_lse_weight = nn.Parameter(torch.ones(heads))
        self.memory_lse_weight = nn.Parameter(torch.ones(heads))
        self.query_vector = nn.Parameter(torch.zeros(heads, head_dim))
        self.local_vector = nn.Parameter(torch.zeros(heads, head_dim))
        self.memory_vector = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(
        self,
        queries: Tensor,
        local_out: Tensor,
        local_lse: Tensor,
        memory_out: Tensor,
        memory_lse: Tensor,
        found: Tensor,
    ) -> Tensor:
        """Logits (B, H, T) for ``fuse``: position-free ``queries`` (B, H, T, D), all else as in the functions above."""
        return (
            self.bias.float().view(-1, 1)
            + self.memory_lse_weight.float().view(-1, 1) * torch.where(found, memory_lse.float(), 0.0)
            - self.local_lse_weight.float().view(-1, 1) * local_lse.float()
            + torch.einsum("bhtd,hd->bht", queries.float(), self.query_vector.float())
            + torch.einsum("bhtd,hd->bht", local_out.float(), self.local_vector.float())
            + torch.einsum("bhtd,hd->bht", memory_out.float(), self.memory_vector.float())
        )


# how fusing gets between a layer's attention and its output projection


def _current_reading() -> Reading | None:
    """How the run that this thread is in reads memory."""
    run = current_run()
    return None if run is None else cast("Reading | None", run.reading)


def _fuse_in_interface(attention: Any, reader: MemoryReader) -> None:
    """Make a module call ``_attend_and_fuse`` as its attention implementation."""
    attention.__dict__["_longmem"] = reader, attention.config
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = _FUSED


def _attend_and_fuse(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention; then, in a call that reads memory, fusion."""
    reader, config = module.__dict__["_longmem"]
    # every family has an eager attention of its own, which is not registered by name
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    out, weights = attend(module, query, key, value, attention_mask, **kwargs)
    if (reading := _current_reading()) is None:
        return cast(Tensor, out), weights
    scaling = scaling_of(module, query, kwargs)
    lse = functools.partial(local_lse, query, key, attention_mask, scaling=scaling, softcap=kwargs.get("softcap"))
    # the interface gives (B, T, H, D)
    return reader.fuse(reading, out.transpose(1, 2), lse).transpose(1, 2), weights


_FUSED = "longmem_fused"
AttentionInterface.register(_FUSED, _attend_and_fuse)
