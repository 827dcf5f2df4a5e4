"""Models to route, and how the tests of this folder read their routes."""

import torch
from torch import nn

import deepopt


def paths(model):
    return {
        name: group["path"] for group in deepopt.param_groups(model) for name, _ in group["params"]
    }


def table(source):
    return {row.name: row for row in deepopt.routing_table(source)}


class LanguageModel(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(100, 32)
        self.attention = nn.MultiheadAttention(32, 2)
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 128)
        self.down = nn.Linear(128, 32)
        self.experts = nn.Parameter(torch.randn(4, 32, 64))
        self.pos_embed = nn.Parameter(torch.randn(1, 50, 32))
        self.unembedding = nn.Linear(32, 100, bias=False)
        if tied:
            self.unembedding.weight = self.tokens.weight


class Conv1D(nn.Module):
    """Like Hugging Face's: a linear layer that is stored as in x out."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


class LoraLinear(nn.Module):
    """Like PEFT's: a frozen layer and factors in dicts by adapter."""

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outputs, bias=False)})


class Layers(nn.Module):
    """A module with any children."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def sequence():
    return nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 100))
