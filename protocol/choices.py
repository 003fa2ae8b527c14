"""Words that a device chooses among when it opens a session; read by its command line, so that nothing slow is here."""

from __future__ import annotations

from typing import Literal

WireDtype = Literal["int8", "fp16", "fp32"]
"""How floating-point tensors cross the wire."""

DifferenceDtype = Literal["int4", "int8", "fp16", "fp32"]
"""How differences to tensors that have crossed do."""

KindChoice = Literal["lora", "bottleneck", "ffa"]
"""Kinds of adapters, by the names of ``adapters.KINDS``."""

Drafts = Literal["auto", "server", "prompt", "off"]
"""Who guesses the tokens that may come next in an answer: the server, from the base model; the device, from what stands
in the text; whichever pays more; or nobody."""

TableDtype = Literal["fp32", "fp16"]
"""How the device's embedding table is stored."""

Send = Literal["embeddings", "token-ids"]
"""What a micro-batch begins with on the wire: embeddings that the device has looked up, or the tokens themselves."""

WeightFormat = Literal["full", "int8", "nf4"]
"""How the base model's linear weights are held: as they are computed with, or in eight or four bits."""

LowBits = Literal["int8", "nf4"]
"""Those of them that are narrower than what is computed with."""

ActiveFrom = Literal["start", "answer"]
"""Where adapters act: from the start of a text, or from the beginning of the answer on (PEFT: activated LoRA)."""

Basis = Literal["data", "weights", "random"]
"""What the frozen A and B of bottleneck adapters are: the directions in which the base model's hidden states and
gradients vary most on some of the data, or those of its weights; or drawn at random."""

UnitKind = Literal["block", "group"]
"""What kill-and-revive switches: all exchange groups of a block at once, or each group by itself."""

ScoreName = Literal["static", "random", "sensitivity", "grad"]
"""What kill-and-revive ranks units by."""

OnKill = Literal["fade", "bypass", "hold_forward", "give_to_server"]
"""What becomes of a killed unit: its effect ends, step by step or at once; or it stays, computed by the device, or by
the server, which is given what the unit has learnt."""
